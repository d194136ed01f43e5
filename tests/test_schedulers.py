"""Every scheduler of diffusers: equal to the unsplit pipeline and the same again, or refused by name in the plan."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ModularPipeline

from runner import Job, Plan, Request, make_plan, run_all, spawn
from runner.artifacts import FolderStore, MemoryStore
from runner.engine.keys import artifact_keys, checkpoint_key
from runner.engine.signals import Interrupted
from runner.job import Label
from stages.errors import InvalidInput, ModelError
from stages.estimate.block_memo import Costs
from stages.estimate.rehearsal import rehearse
from stages.models.checkpoint import find
from stages.models.weights import Weights, weigh
from stages.pipeline.split import split
from stages.pipeline.stage import Stage
from stages.state import State, Value
from tests import tiny
from tests.conftest import Cards
from tests.staging import Keep, on_host
from tests.test_families import CASES, Case

PAGE = (Path(__file__).parent.parent / "docs" / "schedulers.md").read_text()
STEPS = 4
# The columns of the page's table.
FAMILIES = {
    "FLUX.1": Case("flux", tiny.flux, 3.5), "FLUX.2": CASES["flux2-klein"], "Qwen-Image": CASES["qwen-image"],
    "SD3": CASES["sd3"], "Z-Image": CASES["z-image"],
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NOISY = {"stochastic_sampling": True}


@dataclass(frozen=True)
class Row:
    """A row of the table: a scheduler, its config, and the families that it runs in."""

    name: str
    config: Mapping[str, Any]
    families: frozenset[str]

    def __str__(self) -> str:
        return "-".join((self.name, *self.config))


def read_rows() -> list[Row]:
    found = []
    lines = [line for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == len(FAMILIES) + 3]
    for line in lines:
        name, config, *cells = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        runs = frozenset(family for family, cell in zip(FAMILIES, cells, strict=True) if cell == "runs")
        found.append(Row(name, parsed(config), runs))
    return found


def parsed(text: str) -> dict[str, Any]:
    """`flow, solver_order=3` as a config."""
    config: dict[str, Any] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        key, _, value = word.partition("=")
        config |= FLOW if key == "flow" else {key: value or True}
        if value.replace(".", "").isdigit():
            config[key] = json.loads(value)
    return config


ROWS = read_rows()


def scheduled(model: Path, folder: Path, name: str, **config: Any) -> Path:
    """The model with another scheduler; its other components are the same files."""
    folder.mkdir(parents=True)
    for part in model.iterdir():
        if part.is_dir() and part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    index = json.loads((model / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return folder


@dataclass
class Bench:
    """A tiny model with what is the same for every scheduler."""

    case: Case
    model: Path
    inputs: dict[str, Value]
    encoded: State
    weights: Mapping[str, Weights]
    whole: ModularPipeline
    border: Keep
    costs: Costs = field(default_factory=dict)

    def truth(self, scheduler: Any) -> torch.Tensor:
        """The latents of the unsplit pipeline, whose scheduler draws from the generator of the picture."""
        given = dict(self.inputs)
        generator = torch.Generator("cpu").manual_seed(given.pop("seed"))
        if "generator" in inspect.signature(scheduler.step).parameters:
            scheduler.step = partial(scheduler.step, generator=generator)
        self.whole.update_components(scheduler=scheduler)
        if "guider" in self.whole.components:
            scale = {"guidance_scale": given.pop("guidance_scale")} if "guidance_scale" in given else {}
            self.whole.update_components(guider=self.whole.guider.new(enabled=bool(scale), **scale))
        if self.case.family == "sd3":
            given["negative_prompt"] = ""
        self.whole(**given, output_type="pt", generator=generator)
        latents = self.border.values["latents"]
        assert isinstance(latents, torch.Tensor)
        return latents

    def runs_unsplit(self, name: str, model: Path) -> bool:
        """Whether the unsplit pipeline comes to finite latents."""
        try:
            scheduler = getattr(diffusers, name).from_pretrained(model / "scheduler")
            return bool(torch.isfinite(self.truth(scheduler)).all())
        except Exception:  # Anything: that is what is asked.
            return False

    def refusal(self, denoise: Stage) -> str:
        """What the plan says of the scheduler; nothing where it runs."""
        types = dict.fromkeys(self.weights, torch.float32)
        try:
            rehearse(denoise, types, self.weights, self.encoded, self.inputs, [STEPS], self.costs)
        except ModelError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    @cache
    def made(column: str) -> Bench:
        case = FAMILIES[column]
        model = case.build(tmp_path_factory.mktemp("models") / case.family)
        inputs = case.inputs(num_inference_steps=STEPS)
        encode, denoise, _ = split(find(model), inputs)
        with encode.loaded(on_host((encode,))) as loaded:
            encoded = loaded.run(State(), inputs)
        weights = {component.name: weigh(component, torch.float32) for component in denoise.components}
        blocks, border = ModularPipeline.from_pretrained(str(model)).blocks, Keep()
        blocks.sub_blocks.insert("border", border, list(blocks.sub_blocks).index("denoise") + 1)
        whole = blocks.init_pipeline(str(model))
        whole.load_components(dtype=torch.float32)
        whole.set_progress_bar_config(disable=True)
        return Bench(case, model, inputs, encoded, weights, whole, border)

    return made


def cases() -> list[Any]:
    """Every row for FLUX.1, and a few for the others; all of theirs are slow."""
    few = ("FlowMatchEulerDiscreteScheduler-stochastic_sampling", "FlowMatchLCMScheduler", "EulerDiscreteScheduler",
           "DPMSolverMultistepScheduler-use_flow_sigmas-prediction_type-use_dynamic_shifting-algorithm_type",
           "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler-use_flow_sigmas-prediction_type",
           "LTXEulerAncestralRFScheduler")
    return [pytest.param(row, column, id=f"{column}-{row}",
                         marks=() if column == "FLUX.1" or str(row) in few else pytest.mark.slow)
            for row in ROWS for column in FAMILIES]


@pytest.mark.parametrize(("row", "column"), cases())
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_runs_as_in_the_unsplit_pipeline_and_repeats_or_is_refused(
    row: Row, column: str, bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    it = bench(column)
    model = scheduled(it.model, tmp_path / "model", row.name, **row.config)
    _, denoise, _ = split(find(model), it.inputs)
    refusal = it.refusal(denoise)
    assert (column in row.families) is not bool(refusal), refusal
    if refusal:
        assert row.name in refusal and "\n" not in refusal
        assert not it.runs_unsplit(row.name, model)
        return
    with denoise.loaded(on_host((denoise,))) as loaded:
        first, second = (loaded.run(it.encoded, it.inputs).tensors()["latents"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, it.truth(getattr(diffusers, row.name).from_pretrained(model / "scheduler")))


def test_every_scheduler_of_diffusers_has_a_row() -> None:
    names = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert {row.name for row in ROWS} == names and f"diffusers {diffusers.__version__}" in PAGE


def asked(model: Path, steps: int = STEPS, count: int = 1, **more: Any) -> Job:
    requests = [Request("a red circle", 64, 48, steps, 3.5, 7 + index, 32, index) for index in range(count)]
    return Job("flux", requests, model=model, dtype={"": torch.float32}, **{"devices": ["cpu"]} | more)


def planned(model: Path, steps: int = STEPS, count: int = 1, **more: Any) -> Plan:
    return make_plan(asked(model, steps, count, **more))


def pixels(plan: Plan, **more: Any) -> list[np.ndarray]:
    return [picture.pixels for picture in run_all(plan, **more).pictures]


@pytest.mark.parametrize(("name", "config"), [
    ("FlowMatchEulerDiscreteScheduler", NOISY), ("FlowMatchLCMScheduler", {}),
])
def test_a_run_that_draws_in_each_step_goes_on_with_the_same_noise(
    flux: Path, tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    plan = planned(scheduled(flux, tmp_path / "model", name, **config))
    store, steps = FolderStore(tmp_path / "store", warn=print), list[int]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["step"])

    with pytest.raises(Interrupted):
        run_all(plan, store=store, emit=emit, stop=lambda: len(steps) == 2)
    assert store.find(checkpoint_key(artifact_keys(plan)["denoise"][0])) is not None
    # What others draw meanwhile makes no difference.
    torch.rand(3)
    rest = pixels(plan, store=store, emit=emit)
    assert steps == [1, 2, 3, 4] and np.array_equal(rest[0], pixels(plan)[0])


def test_the_noise_of_steps_depends_on_no_lane_and_no_card(
    flux: Path, tmp_path: Path, cards: Cards, sim: ModuleType
) -> None:
    model = scheduled(flux, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", **NOISY)
    alone = pixels(planned(model, count=3))
    plan = planned(model, count=3, devices=cards(40_000_000, 40_000_000), place=["denoise=sharded"], lanes=2)
    assert plan.lanes == 2
    assert all(np.array_equal(one, other) for one, other in zip(pixels(plan), alone, strict=True))
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.slow
@pytest.mark.parametrize(("place", "levels"), [((), 0), (["denoise=tensor_parallel"], 1)], ids=["dealt", "together"])
def test_the_noise_of_steps_depends_on_no_rank(flux: Path, tmp_path: Path, place: Sequence[str], levels: int) -> None:
    """Two ranks that work on a picture together round otherwise, as they do with every scheduler."""
    model = scheduled(flux, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", **NOISY)
    alone = pixels(planned(model, count=2))
    made = spawn(asked(model, count=2, store=tmp_path / "store", place=place), ranks=2)
    for one, other in zip(made.pictures, alone, strict=True):
        assert np.abs(one.pixels.astype(int) - other).max() <= levels


def test_another_scheduler_is_another_picture_of_the_same_embeddings(flux: Path, tmp_path: Path) -> None:
    """Also where diffusers writes an infinity into its config, which is no JSON."""
    store = MemoryStore(warn=print)
    made = []
    for index, least in enumerate((-float("inf"), -5.1)):
        folder = scheduled(flux, tmp_path / str(index), "DPMSolverMultistepScheduler")
        diffusers.DPMSolverMultistepScheduler(
            **FLOW, use_dynamic_shifting=True, lambda_min_clipped=least).save_pretrained(folder / "scheduler")
        made.append(folder)
    assert "-Infinity" in (made[0] / "scheduler" / "scheduler_config.json").read_text()
    plans = [planned(model) for model in (flux, *made)]
    assert len({plan.checkpoint.identity for plan in plans}) == 3
    keys = [artifact_keys(plan) for plan in plans]
    assert [len({tuple(key[stage]) for key in keys}) for stage in ("encode", "denoise", "decode")] == [1, 3, 3]
    assert [run_all(plan, store=store).stages[0].ran for plan in plans] == [1, 0, 0]


def test_not_a_number_is_still_damaged_json(flux: Path, tmp_path: Path) -> None:
    model = scheduled(flux, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", shift=float("nan"))
    with pytest.raises(ModelError, match="NaN is not JSON"):
        planned(model)


@pytest.mark.parametrize("steps", [1, 40])
def test_a_plan_counts_every_timestep(flux: Path, cards: Cards, sim: ModuleType, steps: int) -> None:
    device, *_ = cards(40_000_000)
    needs, taken = [], []
    for count in (2, 2 + steps):
        plan = planned(flux, count, devices=[device], modulation_table=False)
        needs.append(plan.needs["denoise"][device].total)
        taken.append(run_all(plan).stages[1].peak[device])
    assert all(peak <= need for peak, need in zip(taken, needs, strict=True))
    # A float32 timestep and a sigma.
    assert needs[1] - needs[0] == 8 * steps


@pytest.mark.parametrize("solver", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_plan_counts_what_a_solver_of_a_high_order_keeps(
    flux: Path, tmp_path: Path, cards: Cards, sim: ModuleType, solver: str
) -> None:
    device, *_ = cards(40_000_000)
    model = scheduled(flux, tmp_path / "model", solver, **FLOW, use_dynamic_shifting=True, solver_order=3)
    plan = planned(model, 9, devices=[device], modulation_table=False)
    peak = run_all(plan).stages[1].peak[device]
    assert peak <= plan.needs["denoise"][device].total <= 1.1 * peak


def test_one_step_that_is_nought_by_nought_is_refused_with_the_steps_that_are_enough(
    flux: Path, tmp_path: Path
) -> None:
    model = scheduled(flux, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", shift_terminal=0.02)
    with pytest.raises(InvalidInput) as refused:
        planned(model, 1)
    assert refused.value.text == (
        "`steps=1`: FlowMatchEulerDiscreteScheduler (shift_terminal=0.02) has no schedule for so few: its sigmas are "
        "nan, 0 (0/0) -> use `steps=2` or more")
    assert [(fix.field, fix.value) for fix in refused.value.fixes] == [("steps", 2)]
    assert planned(model, 2).requests[0].steps == 2


def test_one_step_is_refused_so_where_steps_are_looked_up_by_their_timesteps(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    it = bench("Z-Image")
    model = scheduled(it.model, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", shift_terminal=0.02)
    with pytest.raises(InvalidInput, match=r"its sigmas are nan, 0 \(0/0\) -> use"):
        make_plan(Job("z-image", [Request("a red circle", 64, 48, 1, None, 7, 64)], model=model, devices=["cpu"]))


def test_a_line_with_too_few_steps_is_refused_alone(flux: Path, tmp_path: Path) -> None:
    model = scheduled(flux, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", shift_terminal=0.02)
    requests = [Request("a red circle", 64, 48, steps, 3.5, 7, 32, index) for index, steps in enumerate((1, 2))]
    job = Job("flux", requests, model=model, devices=["cpu"], labels=[Label(line=1), Label(line=2)])
    plan = make_plan(job)
    assert [request.steps for request in plan.requests] == [2]
    assert [(line.line, "use `steps=2`" in line.text) for line in plan.job.refused] == [(1, True)]


@pytest.mark.skipif(find_spec("scipy") is not None, reason="scipy is here")
def test_a_package_that_is_not_here_is_named(flux: Path, tmp_path: Path) -> None:
    model = scheduled(flux, tmp_path / "model", "FlowMatchEulerDiscreteScheduler", use_beta_sigmas=True)
    with pytest.raises(ModelError, match=r"scheduler of .*, a FlowMatchEulerDiscreteScheduler, could not be loaded "
                                         r"\(ImportError: Make sure to install scipy"):
        planned(model)


@pytest.mark.parametrize(("name", "config", "why"), [
    ("EulerDiscreteScheduler", {}, "TypeError: .*set_timesteps.* got an unexpected keyword argument 'mu'"),
    ("HeunDiscreteScheduler", {}, "ValueError: .* HeunDiscreteScheduler.s .set_timesteps. does not support custom"),
    ("DPMSolverMultistepScheduler", FLOW, "AssertionError: assert self.config.use_dynamic_shifting and"),
    ("UniPCMultistepScheduler", FLOW | {"use_exponential_sigmas": True}, "latents are not finite after step 1"),
    ("PiflowScheduler", {}, "ValueError: PiflowScheduler only supports its configured distilled timestep schedule"),
])
def test_a_plan_says_why_a_scheduler_cannot_be_used(
    flux: Path, tmp_path: Path, name: str, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=rf"^{name}.* cannot run the denoise of FluxPipeline: {why}.* -> give "):
        planned(scheduled(flux, tmp_path / "model", name, **config))


def test_a_scheduler_that_draws_from_elsewhere_is_refused(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = diffusers.FlowMatchLCMScheduler.step

    def undirected(self: Any, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return step(self, model_output, timestep, sample, return_dict=return_dict)

    monkeypatch.setattr(diffusers.FlowMatchLCMScheduler, "step", undirected)
    with pytest.raises(ModelError, match=r"FlowMatchLCMScheduler cannot run .* noise from a source that no seed sets"):
        planned(scheduled(flux, tmp_path / "model", "FlowMatchLCMScheduler"))
