"""A denoiser whose modulation is computed ahead makes the very same latents, and is smaller by what the plan says."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, ModularPipeline, WanTransformer3DModel

from runner import Job, Plan, Request, RunPolicy, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.planning.precompute import TableSaving
from stages.families import FAMILIES
from stages.loading.load import load
from stages.models.checkpoint import Component, find
from stages.models.skeleton import copy_skeleton, new_skeleton, skeleton
from stages.models.weights import weigh
from stages.pipeline.split import split
from stages.placement.placement import Place, Placement, Resident
from stages.placement.streaming import Streamed
from stages.precompute.conditioning import program_of
from stages.precompute.program import Call, Program
from stages.precompute.recorder import RecordedCall, conditioning_program
from stages.precompute.replay import precomputed_linears
from stages.precompute.table import Layout, ModulationTable, TableChunk, compute_rows
from tests import sparse, tiny
from tests.staging import run_staged
from tests.test_cards import MIB, halved, over
from tests.test_families import CASES

Cards = Callable[..., list[str]]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def asked(*wanted: tuple[str, int], **more: Any) -> list[Request]:
    facts = {"steps": 3, "guidance": 3.5, "text_tokens": 32} | more
    return [Request(prompt, 64, 48, seed=seed, index=index, **facts) for index, (prompt, seed) in enumerate(wanted)]


REQUESTS = asked(("a red circle", 7), ("two small green squares", 8), ("a red circle", 9))


def plan(model: Path, dtype: torch.dtype, requests: Sequence[Request] = REQUESTS, family: str = "flux") -> Plan:
    return make_plan(Job(family, requests, model=model, dtype={"": dtype}, devices=["cpu"], modulation_table=False))


def with_table(job: Plan) -> Plan:
    """The same plan with the table."""
    model, dtype = job.checkpoint.path, job.places["denoise", "transformer"].dtype
    requests = [dataclasses.replace(request, steps=1) for request in job.requests[:1]]
    folding = make_plan(Job(job.family.name, requests, model=model, dtype={"": dtype}, devices=["cpu"]))
    layers = folding.places["denoise", "transformer"].precomputed
    assert layers
    place = dataclasses.replace(job.places["denoise", "transformer"], precomputed=layers)
    return job.moved("denoise", {"transformer": place})


def latents(job: Plan) -> list[torch.Tensor]:
    store = MemoryStore(warn=print)
    keys = run_all(job, RunPolicy(stop_after="denoise"), store=store).keys["denoise"]
    return [state.tensors()["latents"] for key in keys if (state := store.get(key)) is not None]


def assert_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    assert len(some) == len(others) > 0
    assert [(a - b).abs().max().item() for a, b in zip(some, others, strict=True)] == [0.0] * len(some)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX without the guidance embedding."""
    return tiny.flux(tmp_path_factory.mktemp("schnell") / "flux", guidance=False)


@TYPES
@pytest.mark.parametrize("model", ["flux", "schnell"])
def test_several_prompts_and_seeds_come_out_the_same(
    request: pytest.FixtureRequest, model: str, dtype: torch.dtype
) -> None:
    job = plan(request.getfixturevalue(model), dtype)
    plain, replayed = latents(job), latents(with_table(job))
    assert_same(replayed, plain)
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])


def test_another_order_and_other_steps_come_out_the_same(flux: Path) -> None:
    order = [dataclasses.replace(one, index=index, steps=2 + index) for index, one in enumerate(REQUESTS[::-1])]
    job = plan(flux, torch.float32, order)
    assert_same(latents(with_table(job)), latents(job))


def test_a_table_too_large_for_its_limit_is_made_in_parts(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan(flux, torch.float32)
    expected = latents(job)
    opened: list[int] = []

    class Counted(ModulationTable):
        def compute(self, order: Sequence[int]) -> TableChunk:
            opened.append(len(order))
            return super().compute(order)

    monkeypatch.setattr("runner.engine.stage_runner.ModulationTable", partial(Counted, limit=1))
    assert_same(latents(with_table(job)), expected)
    # The third has the prompt of the first, whose rows are gone by then.
    assert opened == [3, 2, 1]


@TYPES
def test_a_denoiser_over_two_cards_comes_out_the_same(flux: Path, cards: Cards, dtype: torch.dtype) -> None:
    first, second = devices = cards(40 * MIB, 40 * MIB)
    places: dict[str, Placement] = {
        "text_encoder": Resident(first), "text_encoder_2": Resident(second), "transformer": halved(first, second),
        "vae": Resident(second),
    }
    job = over(flux, devices, places, REQUESTS)
    job = dataclasses.replace(job, places={part: Place(p.placement, dtype) for part, p in job.places.items()})
    assert_same(latents(with_table(job)), latents(job))


def test_blocks_that_wait_in_host_memory_come_out_the_same(flux: Path, cards: Cards) -> None:
    (card,) = devices = cards(40 * MIB)
    split_up = halved(card, card)
    streamed = Streamed(card, split_up.devices, split_up.rest, cpu_blocks=frozenset(["transformer_blocks.1"]))
    places: dict[str, Placement] = {"transformer": streamed}
    places |= {name: Resident(card) for name in ("text_encoder", "text_encoder_2", "vae")}
    job = over(flux, devices, places, REQUESTS[:2])
    assert_same(latents(with_table(job)), latents(job))


def test_the_peak_falls_by_what_the_plan_says(tmp_path: Path, cards: Cards) -> None:
    """Of a denoiser of 17 MB; activations are the same with and without."""
    model = tiny.flux(tmp_path / "flux", doubles=6, singles=12, heads=6)
    (card,) = cards(60 * MIB)
    plans = [
        make_plan(Job("flux", REQUESTS[:2], model=model, devices=[card], dtype={"": torch.float32},
                      modulation_table=table))
        for table in (False, True)
    ]
    peaks = [run_all(job, RunPolicy(stop_after="denoise")).stages[1].peak[card] for job in plans]
    saving = plans[1].savings["transformer"]
    assert saving.left < 0.8 * saving.whole and not plans[0].places["denoise", "transformer"].precomputed
    assert peaks[0] - peaks[1] == pytest.approx(saving.whole - saving.left, rel=0.05)
    needs = [job.needs["denoise"][card].total for job in plans]
    assert needs == [pytest.approx(peak, rel=0.05) for peak in peaks]


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_out_the_same(tmp_path: Path, name: str) -> None:
    """With guidance where there is some: two calls of the denoiser for a step, with prompts of different lengths."""
    case = CASES[name]
    model = case.build(tmp_path / "model")
    requests = [case.inputs(), case.inputs(prompt="two small green squares", seed=8)]
    plain = run_staged(model, requests)
    denoise = split(find(model), list(requests[0]))[1]
    layers = frozenset(conditioning_program(denoise, torch.float32, plain["encode"][0], requests[0]).layers)
    places = {"transformer": Place(Resident("cpu"), torch.float32, layers)}
    table = ModulationTable(denoise, places, layers, [0, 1], lambda index: (plain["encode"][index], requests[index]))
    table.chunk_for(0)
    if name == "qwen-image":
        # It is told nothing but the timestep: two rows, for both prompts and with and without the negative one.
        (program,) = {found.canonical for found in table.programs}
        assert table.bytes == 2 * Layout.of(program.layers).size and len(table.programs) > 1
    with denoise.loaded(places) as loaded, table.attached(loaded):
        for index, state in enumerate(plain["encode"]):
            with table.request(index):
                found = loaded.run(state, requests[index])
            assert torch.equal(found.tensors()["latents"], plain["denoise"][index].tensors()["latents"])


def shares(folder: Path, build: Callable[[Path], Path], name: str) -> TableSaving:
    family = FAMILIES[name]
    request = Request("a red circle", *family.size, 1, family.guidance, 7, family.text_tokens)
    job = make_plan(Job(name, [request], model=build(folder / name), dtype={"": torch.bfloat16}), machine="4x80GB")
    return job.savings["transformer"]


def test_the_shares_of_full_size_models(tmp_path: Path) -> None:
    flux = shares(tmp_path, sparse.flux_dev, "flux")
    assert (flux.whole, flux.left) == (23_802_816_640, 17_243_396_224)
    assert flux.row == pytest.approx(2.1e6, rel=0.03)
    # SD3.5's table of positions is 0.17 GB on top of the design's 16.11 and 10.71.
    sd3 = shares(tmp_path, sparse.sd35_large, "sd3")
    assert (sd3.whole - sd3.left) / 1e9 == pytest.approx(5.41, abs=0.01)
    qwen = shares(tmp_path, sparse.qwen_image, "qwen-image")
    assert (qwen.whole - qwen.left) / 1e9 == pytest.approx(13.65, abs=0.01)


def hunyuan(folder: Path) -> Component:
    """A tiny HunyuanVideo transformer, saved."""
    torch.manual_seed(0)
    HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    ).save_pretrained(folder)
    return Component("transformer", "diffusers", "HunyuanVideoTransformer3DModel", folder,
                     (folder / "diffusion_pytorch_model.safetensors",))


@dataclass
class Rows:
    """The rows of one call: a `Source`."""

    row_of_bytes: torch.Tensor
    layout: Layout

    def row(self, layer: str, device: torch.device) -> torch.Tensor:
        return self.layout.view(self.row_of_bytes, layer).to(device)


@TYPES
def test_a_video_transformer_comes_out_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """HunyuanVideo's pipeline is no family here, so its transformer is called by hand, at two timesteps."""
    component, place = hunyuan(tmp_path), Place(Resident("cpu"), dtype)
    whole = load(component, place)
    torch.manual_seed(1)
    shared = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 5, 16, dtype=dtype), "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": torch.randn(1, 8, dtype=dtype), "guidance": torch.tensor([6000.0], dtype=dtype),
    }
    calls = [{**shared, "timestep": torch.tensor([at])} for at in (1000, 250)]
    found = program_of(new_skeleton(component, dtype), Call(whole, (), calls[0]))
    assert {name for name in found.layers if name.startswith("single_transformer_blocks.1.")} == {
        "single_transformer_blocks.1.norm.linear"}
    recorded = [RecordedCall.of(found, Call(whole, (), call)) for call in calls]
    rows = compute_rows(component, place, found, {one.key: one for one in recorded})
    small = load(component, dataclasses.replace(place, precomputed=frozenset(found.layers)))
    assert weigh(component, dtype, frozenset(found.layers)).total == sum(p.nbytes for p in small.parameters())
    with torch.no_grad():
        for call, one in zip(calls, recorded, strict=True):
            for replay in precomputed_linears(small):
                replay.source = Rows(rows[one.key], Layout.of(found.layers))
            assert torch.equal(small(**call).sample, whole(**call).sample)


def wan(**more: torch.Tensor) -> Program:
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).to("meta").eval()
    kwargs = {"hidden_states": torch.zeros(1, 4, 1, 4, 4), "encoder_hidden_states": torch.zeros(1, 3, 16), **more}
    return program_of(model, Call(model, (), kwargs))


def test_a_timestep_for_every_token_is_no_conditioning() -> None:
    assert list(wan(timestep=torch.ones(1)).layers) == ["condition_embedder.time_proj"]
    assert not wan(timestep=torch.ones(1, 4)).layers


def test_a_layer_that_the_model_looks_into_stays() -> None:
    """Wan asks the time embedder for its type, so only what comes after it is left out."""
    steps = [step.layer for step in wan(timestep=torch.ones(1)).steps if step.layer]
    assert steps == ["condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
                     "condition_embedder.time_proj"]


def test_a_table_for_other_conditioning_is_noticed(flux: Path) -> None:
    """Nothing replayed is ever wrong without a word: neither other values nor another number of calls."""
    job = with_table(plan(flux, torch.float32))
    store = MemoryStore(warn=print)
    keys = run_all(job, RunPolicy(stop_after="encode"), store=store).keys["encode"]
    states = [state for key in keys if (state := store.get(key)) is not None]
    inputs = [request.inputs for request in job.requests]
    places = job.places_of("denoise")
    table = ModulationTable(job.stages[1], places, places["transformer"].precomputed, [0, 1],
                            lambda index: (states[index], inputs[index]))
    with job.stages[1].loaded(job.places_of("denoise")) as loaded, table.attached(loaded):
        with table.request(0):
            loaded.run(states[0], inputs[0])
        with pytest.raises(AssertionError, match="given what the table was not"), table.request(0):
            loaded.run(states[1], inputs[0])
        with pytest.raises(AssertionError, match="called more than 3 times"), table.request(0):
            loaded.run(states[0], {**inputs[0], "num_inference_steps": 4})
        with pytest.raises(AssertionError, match="2 calls of the denoiser, 3 expected"), table.request(0):
            loaded.run(states[0], {**inputs[0], "num_inference_steps": 2, "sigmas": [1.0, 0.9]})


def test_a_folded_denoiser_without_its_table_does_not_run(flux: Path) -> None:
    job = with_table(plan(flux, torch.float32))
    store = MemoryStore(warn=print)
    state = store.get(run_all(job, RunPolicy(stop_after="encode"), store=store).keys["encode"][0])
    assert state is not None
    loading = job.stages[1].loaded(job.places_of("denoise"))
    with pytest.raises(AssertionError, match="no table was attached"), loading as loaded:
        loaded.run(state, job.requests[0].inputs)


def test_no_table_where_it_saves_too_little_or_is_not_wanted(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(flux, torch.float32).savings["transformer"].refused == "not wanted"
    monkeypatch.setattr("runner.planning.precompute.LEAST", 0.9)
    job = make_plan(Job("flux", REQUESTS[:1], model=flux, devices=["cpu"]))
    saving = job.savings["transformer"]
    assert "is not more than 90 %" in saving.refused
    assert saving.left == saving.whole == job.weights["denoise", "transformer"].total
    assert not job.places["denoise", "transformer"].precomputed


def test_resuming_and_another_placement_find_the_same_artifacts(flux: Path) -> None:
    job = plan(flux, torch.float32)
    store = MemoryStore(warn=print)
    run_all(job, RunPolicy(stop_after="denoise"), store=store)
    report = run_all(with_table(job), RunPolicy(stop_after="denoise"), store=store)
    assert [stage.ran for stage in report.stages] == [0, 0] and "table" not in report.stages[1].seconds


def test_what_a_stage_puts_on_its_denoiser_stays_off_the_skeleton_that_all_share(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    stage = make_plan(Job("flux", [Request("a fox", 64, 48, 2, 3.5, 7, 32)], model=flux, devices=["cpu"])).stages[1]
    (component,) = stage.components
    shared = skeleton(component)

    def prepare(pipe: ModularPipeline) -> None:
        pipe.transformer.x_embedder.register_forward_hook(lambda *call: seen.append("embedded"))

    monkeypatch.setattr(stage, "prepare", prepare)
    pipe = stage.pipeline({component.name: copy_skeleton(shared, lambda: "cpu")})
    assert pipe.transformer.device == torch.device("cpu")
    pipe.transformer.x_embedder(torch.empty(1, shared.x_embedder.in_features, device="meta"))
    assert seen == ["embedded"] and skeleton(component) is shared
    assert not any(module._forward_hooks for module in shared.modules())
