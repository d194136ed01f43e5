"""Who watches over ranks: from their beats, which of them is lost."""

import time
from collections.abc import Callable, Mapping
from typing import Any

TIMEOUT = 120.0
SILENCE = 20.0


class Watchdog:
    """The last signs of life of the ranks `others`.

    Of a rank that started, `SILENCE` seconds without a beat are too many, and so are `timeout` seconds, or as many as
    its beat says, in which it neither worked nor waited for another; it may take `timeout` seconds to start.
    """

    def __init__(
        self, others: range, timeout: float = TIMEOUT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout, self._clock = timeout, clock
        self._beats: dict[int, Mapping[str, Any]] = {}
        self._heard = dict.fromkeys(others, clock())

    def see(self, rank: int, beat: Mapping[str, Any]) -> None:
        """Take in the latest beat of a rank; the same one twice is no sign of life."""
        if rank in self._heard and self._beats.get(rank, {}).get("beat") != beat["beat"]:
            self._beats[rank], self._heard[rank] = beat, self._clock()

    def end(self, rank: int) -> None:
        """A rank has done its share, or said that it will not: nothing is expected of it any more."""
        self._heard.pop(rank, None)

    @property
    def silence(self) -> float:
        """The seconds without a beat that are too many."""
        return min(SILENCE, self._timeout)

    def silent(self, seconds: float) -> list[int]:
        """The ranks that started and were not heard for so long."""
        now = self._clock()
        return [rank for rank, heard in self._heard.items() if rank in self._beats and now - heard > seconds]

    def where(self, rank: int) -> str:
        """Where a rank was when last heard of."""
        return str(self._beats.get(rank, {}).get("where", "before it started"))

    def lost(self) -> tuple[int, str] | None:
        """The first rank that is lost, and what is wrong with it; None while all are well."""
        now = self._clock()
        for rank, heard in self._heard.items():
            silence, idle = now - heard, float(self._beats.get(rank, {}).get("idle", 0.0))
            if rank not in self._beats and silence > self._timeout:
                return rank, f"rank {rank} did not start within {self._timeout:.0f} s"
            if rank in self._beats and silence > self.silence:
                return rank, (f"rank {rank} hangs: no sign of life for {silence:.0f} s, last {self.where(rank)} "
                              f"(stopped, or its host is gone)")
            if idle > max(self._timeout, float(self._beats.get(rank, {}).get("patience", 0.0))):
                return rank, f"rank {rank} hangs {self.where(rank)}: it neither computed nor read for {idle:.0f} s"
        return None
