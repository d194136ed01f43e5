"""Ranks that denoise one picture together: each step is one computation, so all of them must do the same.

What there is to do is the first rank's to decide, who alone looks into the store for what is done; it is told through
gloo, in order. Whether to stop after a step is asked of all, and one that must stop is enough.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from runner.distributed.env import Rank
from runner.distributed.heartbeat import Heartbeat
from runner.engine.stage_runner import WorkItem

# Whoever is lost is noticed by its heartbeat, long before.
_LONGEST = timedelta(days=7)
_PATIENCE = 10.0


class RankCollectives:
    """The process group of ranks that meet at the file `rendezvous`, for a `with` statement; this is on `device`."""

    def __init__(self, rank: Rank, device: str, rendezvous: Path, heartbeat: Heartbeat) -> None:
        self._rank, self._device, self._rendezvous, self._heartbeat = rank, device, rendezvous, heartbeat

    def __enter__(self) -> "RankCollectives":
        # Names of hosts may lead anywhere, and all of these processes are on this one.
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        device = torch.device(self._device)
        backend = "cpu:gloo"
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)
            backend += f",{device.type}:{distributed.get_default_backend_for_device(device)}"
        with self._heartbeat.waiting():
            distributed.init_process_group(backend, init_method=f"file://{self._rendezvous}", rank=self._rank.rank,
                                           world_size=self._rank.size, timeout=_LONGEST)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            distributed.destroy_process_group()
        elif issubclass(kind, RuntimeError):
            # A rank whose others are gone knows least of why: whoever watches over all should see those first.
            time.sleep(_PATIENCE)

    def begin(self, items: Sequence[WorkItem]) -> None:
        """The first rank tells the others what is to be made; of those nothing is heard."""
        if self._rank.first:
            self._send({"items": [asdict(item) for item in items]})

    def end(self) -> None:
        """The first rank tells the others that there is nothing more to do."""
        self._send({})

    def next_items(self) -> list[WorkItem] | None:
        """What the first rank begins; None when there is no more."""
        message = self._receive()
        if not message:
            return None
        return [WorkItem(**{**item, "requests": tuple(item["requests"])}) for item in message["items"]]

    def broadcast_flag(self, flag: bool) -> bool:
        """The flag of the first rank."""
        if not self._rank.first:
            return bool(self._receive()["flag"])
        self._send({"flag": flag})
        return flag

    def any_stopping(self, stopping: bool) -> bool:
        """Whether any of the ranks must stop."""
        asked = torch.tensor([int(stopping)])
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _send(self, message: Mapping[str, Any]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        distributed.broadcast(torch.tensor([len(data)]), 0)
        distributed.broadcast(data, 0)

    def _receive(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        with self._heartbeat.waiting():
            distributed.broadcast(length, 0)
        data = torch.empty(int(length.item()), dtype=torch.uint8)
        distributed.broadcast(data, 0)
        return dict(json.loads(data.numpy().tobytes()))
