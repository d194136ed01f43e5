"""Ranks that denoise one picture together: each step is one computation, so all of them must do the same.

What there is to do is the first rank's to decide, who alone looks into the store for what is done; it is told through
gloo, in order. Whether to stop after a step is asked of all, and one that must stop is enough.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from runner.distributed.env import Rank
from runner.distributed.heartbeat import Heartbeat

# Whoever is lost is noticed by its pulse, long before.
_LONGEST = timedelta(days=7)
_PATIENCE = 10.0


@dataclass
class Collectives:
    """One of the ranks that meet at the file `meeting`, for a `with` statement; it computes on `device`."""

    rank: Rank
    device: str
    meeting: Path
    pulse: Heartbeat

    def __enter__(self) -> "Collectives":
        # Names of hosts may lead anywhere, and all of these processes are on this one.
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device = torch.device(self.device)
        backend = "cpu:gloo"
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)
            backend += f",{device.type}:{distributed.get_default_backend_for_device(device)}"
        with self.pulse.waiting():
            distributed.init_process_group(backend, init_method=f"file://{self.meeting}", rank=self.rank.rank,
                                           world_size=self.rank.size, timeout=_LONGEST)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            distributed.destroy_process_group()
        elif issubclass(kind, RuntimeError):
            # A rank whose others are gone knows least of why: whoever watches over all should see those first.
            time.sleep(_PATIENCE)

    def begin(self, keys: Sequence[str], before: Sequence[str] | None, todo: Sequence[int]) -> None:
        """The first rank tells the others what it begins; of those nothing is heard."""
        if self.rank.first:
            self._tell({"keys": list(keys), "before": list(before or ()), "todo": list(todo)})

    def over(self) -> None:
        """The first rank tells the others that there is nothing more to do."""
        self._tell({})

    def next(self) -> Mapping[str, Any] | None:
        """What the first rank begins; None when it is over."""
        return self._told() or None

    def agreed(self, wish: bool) -> bool:
        """What the first rank wishes."""
        if not self.rank.first:
            return bool(self._told()["agreed"])
        self._tell({"agreed": wish})
        return wish

    def stopping(self, wish: bool) -> bool:
        """Whether any of the ranks must stop."""
        asked = torch.tensor([int(wish)])
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _tell(self, said: Mapping[str, Any]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        distributed.broadcast(torch.tensor([len(data)]), 0)
        distributed.broadcast(data, 0)

    def _told(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        with self.pulse.waiting():
            distributed.broadcast(length, 0)
        data = torch.empty(int(length.item()), dtype=torch.uint8)
        distributed.broadcast(data, 0)
        return dict(json.loads(data.numpy().tobytes()))
