"""A denoise that stops in the middle goes on from there, to the same last bit, and nothing is left over."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner import Job, Request, RunPolicy, make_plan, run_all, run_stage
from runner.artifacts import FolderStore, MemoryStore
from runner.engine.keys import artifact_keys, checkpoint_key
from runner.engine.signals import Interrupted, StopRequest
from stages.errors import BadResult
from stages.models.checkpoint import find
from stages.pipeline.split import split
from stages.pipeline.step_hook import StepCheckpoint
from stages.state import State
from tests.staging import named, on_host
from tests.test_families import CASES, Case

ASKED = Request("a red circle", 64, 48, 4, 3.5, 7, 32)
OTHER = Request("a green square", 64, 48, 4, 3.5, 8, 32, 1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_family_goes_on_from_any_step(tmp_path: Path, case: Case) -> None:
    inputs = case.inputs(num_inference_steps=4)
    encode, denoise, _ = split(find(case.build(tmp_path / "model")), inputs)
    places = on_host((encode, denoise))
    with encode.loaded(places) as loaded:
        embedded = loaded.run(State(), inputs)
    kept: dict[int, torch.Tensor] = {}

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            kept[data["step"]] = data["latents"]()

    with denoise.loaded(places) as loaded:
        assert loaded.resumable
        whole = loaded.run(embedded, inputs, emit).tensors()
        for step in (1, 3):
            told: list[int] = []
            rest = loaded.run(embedded, inputs, lambda kind, data, told=told: told.append(data["step"]),
                              StepCheckpoint(step, kept[step])).tensors()
            assert told == list(range(step + 1, 5))
            assert all(torch.equal(rest[name], whole[name]) for name in whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.run(embedded, inputs).tensors().items())


def interrupting(number: int, at: int, times: int = 1) -> Callable[[str, Mapping[str, Any]], None]:
    """An emit that sends this process a signal after a step."""

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step" and data["step"] == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return emit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=str)
def test_a_signal_stops_a_run_after_the_step_and_the_next_run_goes_on(
    flux: Path, tmp_path: Path, number: signal.Signals
) -> None:
    job = make_plan(Job("flux", [ASKED, OTHER], model=flux))
    assert job.places["denoise", "transformer"].precomputed
    expected = [picture.pixels for picture in run_all(job).pictures]
    store, before = FolderStore(tmp_path / "store", warn=print), signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        run_all(named(job, "first"), store=store, emit=interrupting(number, 2))
    assert (stopped.value.code, stopped.value.run) == (128 + number, "first")
    assert store.load_run("first")["status"] == "interrupted" and signal.getsignal(number) is before
    assert store.find(checkpoint_key(artifact_keys(job)["denoise"][0])) is not None
    told: list[tuple[int, int]] = []

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            told.append((data["request"], data["step"]))

    again = run_all(job, store=store, emit=emit)
    assert told == [(0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert all(np.array_equal(a.pixels, b) for a, b in zip(again.pictures, expected, strict=True))
    assert sorted(store.keys()) == sorted({key for keys in artifact_keys(job).values() for key in keys})


def test_a_second_signal_does_not_wait_for_the_step(flux: Path) -> None:
    store = MemoryStore(warn=print)
    job = make_plan(Job("flux", [ASKED], model=flux))
    with pytest.raises(Interrupted):
        run_all(named(job, "twice"), store=store, emit=interrupting(signal.SIGINT, 2, times=2))
    assert store.find(checkpoint_key(artifact_keys(job)["denoise"][0])) is None
    assert store.load_run("twice")["status"] == "interrupted"


def test_a_signal_outside_of_a_step_stops_at_once(flux: Path) -> None:
    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "load" and data["stage"] == "decode":
            signal.raise_signal(signal.SIGTERM)

    store, job = MemoryStore(warn=print), make_plan(Job("flux", [ASKED], model=flux))
    with pytest.raises(Interrupted) as stopped:
        run_all(job, store=store, emit=emit)
    assert stopped.value.code == 143 and len(store.keys()) == 2


def test_who_calls_may_stop_a_run_too(flux: Path) -> None:
    store, job, steps = MemoryStore(warn=print), make_plan(Job("flux", [ASKED], model=flux)), list[int]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["step"])

    with pytest.raises(Interrupted):
        run_all(job, store=store, emit=emit, stop=lambda: len(steps) == 3)
    assert steps == [1, 2, 3] and store.find(checkpoint_key(artifact_keys(job)["denoise"][0])) is not None
    # A stage run alone goes on from there, too.
    run_stage(job, "denoise", store=store, emit=emit)
    assert steps == [1, 2, 3, 4]


def test_an_unfinished_denoise_is_kept_from_time_to_time(flux: Path) -> None:
    """A killed process cannot save: what was kept last is what the next run goes on from."""
    store, job, kept = MemoryStore(warn=print), make_plan(Job("flux", [ASKED], model=flux)), list[object]()
    key = checkpoint_key(artifact_keys(job)["denoise"][0])

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        state = store.get(key)
        if kind == "step":
            kept.append(None if state is None else state.values["steps"])
            if data["step"] == 4:
                raise ZeroDivisionError("as if it were killed")

    with pytest.raises(ZeroDivisionError):
        run_all(named(job, "killed"), RunPolicy(step_every=0.0), store=store, emit=emit)
    assert kept == [None, 1, 2, 3] and store.load_run("killed")["status"] == "failed"
    again = run_all(job, store=store)
    assert np.array_equal(again.pictures[0].pixels, run_all(job).pictures[0].pixels) and store.find(key) is None


def test_computing_a_stage_anew_does_not_go_on_from_the_middle(flux: Path) -> None:
    store, job, steps = MemoryStore(warn=print), make_plan(Job("flux", [ASKED], model=flux)), list[int]()
    with pytest.raises(Interrupted):
        run_all(job, store=store, emit=interrupting(signal.SIGINT, 2))

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["step"])

    run_all(job, RunPolicy(from_stage="denoise"), store=store, emit=emit)
    assert steps == [1, 2, 3, 4]


def test_nothing_is_listened_to_outside_of_a_run() -> None:
    halt, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    with halt.listening():
        assert signal.getsignal(signal.SIGTERM) is not before
        with pytest.raises(Interrupted), halt.patiently():
            signal.raise_signal(signal.SIGTERM)
            assert halt.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_single_bad_picture_does_not_end_the_others(flux: Path) -> None:
    job, done = make_plan(Job("flux", [ASKED, OTHER], model=flux)), list[int]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step" and data["request"] == 0 and data["step"] == 2:
            raise BadResult("denoise: latents are not finite after step 2")

    store = MemoryStore(warn=print)
    made = run_all(named(job, "half"), store=store, emit=emit, done=lambda picture: done.append(picture.index))
    assert [(failure.index, failure.stage) for failure in made.failures] == [(0, "denoise")]
    assert "not finite" in made.failures[0].text and [picture.index for picture in made.pictures] == [1] == done
    assert len(store.load_run("half")["failures"]) == 1  # type: ignore[arg-type]
