"""Schedulers with other options than their defaults: equal to the unsplit pipeline and the same again, or refused."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from runner import Job, Request, make_plan, run_all
from runner.artifacts import FolderStore, MemoryStore
from runner.engine.signals import Interrupted
from stages.errors import InvalidInput
from stages.models.checkpoint import find
from stages.pipeline.split import split
from tests.staging import on_host
from tests.test_schedulers import FLOW, Bench, bench, scheduled

__all__ = ["bench"]
VALUES: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
    "timestep_spacing": ("linspace", "leading", "trailing"), "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,), "use_beta_sigmas": (True,), "use_lu_lambdas": (True,),
    "use_flow_sigmas": (True,), "use_dynamic_shifting": (True,), "final_sigmas_type": ("zero", "sigma_min"),
    "lower_order_final": (False,), "euler_at_final": (True,), "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"), "predict_x0": (False,), "thresholding": (True,),
    "rescale_betas_zero_snr": (True,), "set_alpha_to_one": (False,), "steps_offset": (1,),
    "clip_sample": (False, True),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"), "skip_prk_steps": (True,), "num_train_timesteps": (50,),
    "interpolation_type": ("log_linear",), "timestep_type": ("continuous",), "shift": (3.0,), "flow_shift": (3.0,),
    "disable_corrector": ((0, 1),), "tau_func": (None,), "predictor_order": (3,), "corrector_order": (3,),
    "stochastic_sampling": (True,), "invert_sigmas": (True,), "shift_terminal": (0.1,), "s_noise": (0.9,),
    "time_shift_type": ("linear",), "sigma_schedule": ("exponential",), "timestep_scaling": (2.0,),
    "original_inference_steps": (10,), "eta": (0.5,), "trained_betas": ([0.001 * i for i in range(1, 51)],),
}


def cases() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every class with each of its options, for the family that most run in, and those of flows for FLUX.1."""
    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")):
        usual = inspect.signature(getattr(diffusers, name)).parameters
        has_flow = "use_flow_sigmas" in usual
        for option, values in VALUES.items():
            for value in values if option in usual and name != "VQDiffusionScheduler" else ():
                if value == usual[option].default:
                    continue
                yield "SD3", name, {option: value}
                if has_flow and option not in FLOW:
                    yield "SD3", name, {**FLOW, option: value}
                    shifting = {"use_dynamic_shifting": "use_dynamic_shifting" in usual}
                    yield "FLUX.1", name, {**FLOW, **shifting, option: value}
                if name.startswith("FlowMatch"):
                    yield "FLUX.1", name, {option: value}


def compare(it: Bench, name: str, config: Mapping[str, Any], folder: Path) -> str:
    """What is wrong with the scheduler; nothing where it is refused by name, or runs as in diffusers and repeats."""
    model = scheduled(it.model, folder, name, **config)
    _, denoise, _ = split(find(model), it.inputs)
    try:
        refusal = it.refusal(denoise)
    except InvalidInput as error:  # of so few steps
        refusal = str(error)
    if refusal:
        if it.runs_unsplit(name, model):
            return f"refused, and runs: {refusal}"
        return "" if name in refusal and "\n" not in refusal else f"refused so: {refusal}"
    with denoise.loaded(on_host((denoise,))) as loaded:
        first, second = (loaded.run(it.encoded, it.inputs).tensors()["latents"] for _ in range(2))
    expected = it.truth(getattr(diffusers, name).from_pretrained(model / "scheduler"))
    return "" if torch.equal(first, second) and torch.equal(first, expected) else "runs otherwise"


def check(bench: Callable[[str], Bench], chosen: Iterable[tuple[str, str, Mapping[str, Any]]], folder: Path) -> None:
    wrong = []
    for index, (column, name, config) in enumerate(chosen):
        try:
            said = compare(bench(column), name, config, folder / str(index))
        except Exception as error:  # Anything: the case is named with it.
            said = f"{type(error).__name__}: {error}"
        if said:
            wrong.append((column, name, config, said[:300]))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.filterwarnings("ignore")
def test_some_options_run_as_in_the_unsplit_pipeline_or_are_refused(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    check(bench, itertools.islice(cases(), 0, None, 80), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.filterwarnings("ignore")
def test_all_options_run_as_in_the_unsplit_pipeline_or_are_refused(
    bench: Callable[[str], Bench], tmp_path: Path, part: int
) -> None:
    check(bench, itertools.islice(cases(), part, None, 8), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_one_that_draws_noise_repeats_in_a_process_and_after_an_interruption(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    requests = [Request("a red circle", 64, 48, 4, 3.5, 7 + index, 32, index) for index in range(2)]
    plan = make_plan(Job("sd3", requests, model=bench("SD3").model, devices=["cpu"],
                         scheduler="DDPMScheduler,variance_type=fixed_large"))
    store, steps = FolderStore(tmp_path / "store", warn=print), list[int]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["step"])

    with pytest.raises(Interrupted):
        run_all(plan, store=store, emit=emit, stop=lambda: len(steps) == 6)
    made = [run_all(plan, store=each).pictures for each in (store, MemoryStore(warn=print), MemoryStore(warn=print))]
    for first, second, third in zip(*made, strict=True):
        assert np.array_equal(first.pixels, second.pixels) and np.array_equal(second.pixels, third.pixels)
