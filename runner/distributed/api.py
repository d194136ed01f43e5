"""Ranks and Ray from Python, without a launcher: from a script or a notebook."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from runner.artifacts import open_store
from runner.commands.batch import Item
from runner.commands.cli import Options
from runner.commands.clustered import absolute
from runner.commands.make import opened, planned
from runner.commands.order import Order, default_store, new_run
from runner.commands.resumption import record_of
from runner.distributed.process_group import RankProcesses
from runner.distributed.ray import cluster
from runner.distributed.results import differing, joined
from runner.distributed.task import Task
from runner.distributed.watchdog import TIMEOUT
from runner.distributed.worker import REFUSALS
from runner.engine.run import Report
from runner.request import Request
from stages.events import Emit, silent
from stages.models.lora import LoraRequest, read_loras


def spawn(
    family: str,
    requests: Sequence[Request],
    *,
    ranks: int | RankProcesses = 2,
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
    loras: Sequence[str | Path | LoraRequest] = (),
) -> Report:
    """Make pictures with several processes, each with its own cards; the report of all of it.

    `ranks` are as many new ones, or `RankProcesses` that are at work already; `store` is a folder or a URL, by default
    the folder of the command line; the other arguments are those of `make_plan` and `run_all`. Raises what those
    raise, and RankLost, naming rank, stage and step, for a rank that was killed, failed, left early or hangs for
    `timeout` seconds.
    """
    if not isinstance(ranks, RankProcesses):
        with RankProcesses(ranks, timeout=timeout) as crew:
            return spawn(family, requests, ranks=crew, store=store, emit=emit, model=model, revision=revision,
                         dtype=dtype, devices=devices, max_memory=max_memory, place=place, stop_after=stop_after,
                         allow_offload=allow_offload, modulation_table=modulation_table, loras=loras)
    task = called(family, requests, store=store, model=model, revision=revision, dtype=dtype, devices=devices,
                  max_memory=max_memory, place=place, allow_offload=allow_offload, stop_after=stop_after,
                  modulation_table=modulation_table, loras=loras)
    answer = ranks.work(task.document(), emit)
    if "refused" in answer:
        raise _refusal(answer["refused"])
    if (text := differing(answer["shares"])) is not None:
        emit("warning", {"text": text})
    return joined(task.order.run, task.order.requests, answer["shares"], _opened(task.order.store, emit))


def run_on_ray(
    family: str,
    requests: Sequence[Request],
    *,
    store: str | Path | None = None,
    emit: Emit = silent,
    model: str | Path | None = None,
    revision: str | None = None,
    dtype: Mapping[str, torch.dtype] | None = None,
    devices: Sequence[str] = (),
    max_memory: str | None = None,
    place: Sequence[str] = (),
    allow_offload: Literal["cpu", "disk"] | None = None,
    modulation_table: bool = True,
    stop_after: str | None = None,
    loras: Sequence[str | Path | LoraRequest] = (),
) -> Report:
    """Make pictures with workers of a Ray cluster, or of a Ray of this machine's own; the report of all of it.

    The arguments are those of `runner.spawn`; `store` is a folder or URL that all nodes see. Raises what
    `runner.run_all` raises, and ValueError where Ray is not installed.
    """
    task = called(family, requests, store=store, model=model, revision=revision, dtype=dtype, devices=devices,
                  max_memory=max_memory, place=place, allow_offload=allow_offload, stop_after=stop_after,
                  modulation_table=modulation_table, loras=loras)
    task = replace(task, order=absolute(task.order))
    there = opened(task.order, task.said, emit)
    with cluster.connected() as ray:
        job, _ = planned(task.order, task.said, machine=cluster.machine(ray, task.order.devices))
        return cluster.run_all(ray, task, job, store=there, emit=emit, record=record_of(task.order, task.said, job))


def called(
    family: str, requests: Sequence[Request], *, store: str | Path | None, model: str | Path | None,
    revision: str | None, dtype: Mapping[str, torch.dtype] | None, devices: Sequence[str], max_memory: str | None,
    place: Sequence[str], allow_offload: Literal["cpu", "disk"] | None, modulation_table: bool,
    stop_after: str | None, loras: Sequence[str | Path | LoraRequest],
) -> Task:
    """What a call asks for, as a command line would have said it."""
    said = Options(
        ctx=None,  # type: ignore[arg-type]  # no command line is behind them
        max_memory=max_memory, place=list(place), allow_offload=allow_offload,
        no_modulation_table=not modulation_table, stop_after=stop_after,  # type: ignore[arg-type]
    )
    order = Order(
        family=family, model=None if model is None else str(model), revision=revision, refused=(),
        items=tuple(Item(request) for request in requests), run=new_run(), paths=(), devices=tuple(devices),
        loras=read_loras(loras),
        dtype={name: str(type_).removeprefix("torch.") for name, type_ in (dtype or {}).items()},
        store=str(store) if "://" in str(store) else str(Path(store or default_store()).absolute()),
    )
    return Task(order, said)


def _opened(path: str, emit: Emit) -> Any:
    return open_store(path, warn=lambda text: emit("warning", {"text": text}))


def _refusal(refused: Mapping[str, str]) -> Exception:
    kind = next(kind for kind in REFUSALS if kind.__name__ == refused["kind"])
    return kind(refused["text"])
