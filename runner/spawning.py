"""Ranks from Python, without a launcher: from a script or a notebook."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from runner.artifacts import open_store
from runner.batch import Item
from runner.cli import Options
from runner.crew import Crew
from runner.order import Order, default_store, new_run
from runner.request import Request
from runner.run import Report
from runner.shares import differing, joined
from runner.task import Task
from runner.watch import TIMEOUT
from runner.worker import REFUSALS
from stages.stage import Emit, silent


def spawn(
    family: str,
    requests: Sequence[Request],
    *,
    ranks: int | Crew = 2,
    store: str | Path | None = None,
    emit: Emit = silent,
    timeout: float = TIMEOUT,
    model: str | Path | None = None,
    revision: str | None = None,
    dtype: Mapping[str, torch.dtype] | None = None,
    devices: Sequence[str] = (),
    max_memory: str | None = None,
    place: Sequence[str] = (),
    allow_offload: Literal["cpu", "disk"] | None = None,
    modulation_table: bool = True,
    stop_after: str | None = None,
) -> Report:
    """Make pictures with several processes, each with its own cards; the report of all of it.

    `ranks` are as many new ones, or a `Crew` that is at work already; `store` is a folder or a URL, by default the
    folder of the command line; the other arguments are those of `make_plan` and `run_all`. Raises what those raise,
    and RankLost, naming rank, stage and step, for a rank that was killed, failed, left early or hangs for `timeout`
    seconds.
    """
    if not isinstance(ranks, Crew):
        with Crew(ranks, timeout=timeout) as crew:
            return spawn(family, requests, ranks=crew, store=store, emit=emit, model=model, revision=revision,
                         dtype=dtype, devices=devices, max_memory=max_memory, place=place, stop_after=stop_after,
                         allow_offload=allow_offload, modulation_table=modulation_table)
    said = Options(
        ctx=None,  # type: ignore[arg-type]  # no command line is behind them
        max_memory=max_memory, place=list(place), allow_offload=allow_offload,
        no_modulation_table=not modulation_table, stop_after=stop_after,  # type: ignore[arg-type]
    )
    order = Order(
        family=family, model=None if model is None else str(model), revision=revision, refused=(),
        items=tuple(Item(request) for request in requests), run=new_run(), paths=(), devices=tuple(devices),
        dtype={name: str(type_).removeprefix("torch.") for name, type_ in (dtype or {}).items()},
        store=str(store) if "://" in str(store) else str(Path(store or default_store()).absolute()),
    )
    answer = ranks.work(Task(order, said).document(), emit)
    if "refused" in answer:
        raise _refusal(answer["refused"])
    if (text := differing(answer["shares"])) is not None:
        emit("warning", {"text": text})
    return joined(order.run, order.requests, answer["shares"], _opened(order.store, emit))


def _opened(path: str, emit: Emit) -> Any:
    return open_store(path, warn=lambda text: emit("warning", {"text": text}))


def _refusal(refused: Mapping[str, str]) -> ValueError:
    kind = next(kind for kind in REFUSALS if kind.__name__ == refused["kind"])
    return kind(refused["text"])
