"""How far ranks are with their shares of a run: told by each in its beats, and put together for whoever shows it."""

from collections.abc import Mapping
from typing import Any

from runner.events import Emit
from runner.job import STAGES


class Share:
    """An emit that follows one rank through its share, in pictures; parts of pictures count."""

    def __init__(self) -> None:
        self.stage = ""
        self._of, self._reused, self._items = 0, 0, 0
        self._progress: dict[int, float] = {}

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "stage":
            self.stage = str(data["stage"])
            self._of, self._reused, self._items = int(data["requests"]), int(data["reused"]), 0
            self._progress = {}
        elif kind == "item":
            self._items = int(data["of"])
            # Where nothing tells of steps, an item is over when the next one begins.
            self._progress |= {at: 1.0 for at in range(int(data["index"])) if not self._progress.get(at)}
            self._progress[int(data["index"])] = 0.0
        elif kind == "step":
            self._progress[int(data["index"])] = int(data["step"]) / int(data["steps"])
        elif kind == "end":
            self._reused = self._of

    def document(self) -> dict[str, Any]:
        """The stage, how many pictures of the share are through it, and of how many."""
        part = min(1.0, sum(tuple(self._progress.values())) / self._items) if self._items else 0.0
        return {"stage": self.stage, "done": round(self._reused + (self._of - self._reused) * part, 3), "of": self._of}


class Shares:
    """The shares of all ranks: tells `emit`, whenever it changes, how far all of them are together.

    That is in the stage in which the last of them is; who is behind it is through with it.
    """

    def __init__(self, size: int, emit: Emit) -> None:
        self._size, self._emit = size, emit
        self._shares: dict[int, Mapping[str, Any]] = {}
        self._told: Mapping[str, Any] = {}

    def see(self, rank: int, beat: Mapping[str, Any]) -> None:
        """Take in a beat of a rank; ranks that work on every picture together have no shares, and tell of none."""
        if self._size < 2 or beat.get("share") is None:
            return
        self._shares[rank] = beat["share"]
        begun = {rank: share for rank, share in self._shares.items() if share["stage"] in STAGES}
        at = min((STAGES.index(share["stage"]) for share in begun.values()), default=-1)
        done = sum(share["done"] if STAGES.index(share["stage"]) == at else share["of"] for share in begun.values())
        found = {"ranks": self._size, "stage": STAGES[at] if begun else "", "done": round(done, 3)}
        if found != self._told:
            self._told = found
            self._emit("ranks", found)
