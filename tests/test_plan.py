"""Plans: for models of real shapes whose data are holes, by hand arithmetic; and for small ones, which then run."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from runner import Job, Plan, Request, make_plan, run_all, run_stage
from runner.artifacts import MemoryStore
from runner.media.image import card_of
from runner.planning.cache import PlanCache
from runner.planning.ladder import NoStrategyFits
from runner.planning.plan import largest
from stages.errors import DoesNotFit, Fix, ModelError
from stages.families import FAMILIES
from stages.machine import MIB
from stages.placement.placement import Resident
from stages.placement.sharded import Sharded
from stages.placement.transfers import PATTERN_BYTES, corrupted_pairs
from tests import sparse, tiny
from tests import tiny_families as families

Cards = Callable[..., list[str]]
GB, GIB = 10**9, 2**30

# FLUX.1-dev has the width 3072: a linear layer to n widths has n * W2 + n * W parameters.
W, W2 = 3072, 3072 * 3072
ATTENTION = 4 * W2 + 4 * W + 2 * 128
DOUBLE = 2 * 2 * (6 * W2 + 6 * W + ATTENTION + 8 * W2 + 5 * W)
SINGLE = 2 * (3 * W2 + 3 * W + 3 * W2 + 3 * W + 2 * 128 + 4 * W2 + 4 * W + 5 * W2 + W)
FLUX = 23_802_816_640
T5, CLIP = 9_524_621_312, 246_121_576


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev's configs and headers; nothing is on the disk."""
    return sparse.flux_dev(tmp_path_factory.mktemp("sparse") / "flux")


@pytest.fixture(scope="module")
def thousandth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of FLUX.1-dev's blocks, and all of T5's, in a thousandth of the bytes: 17 MB and 6.6 MB in float32."""
    folder = tmp_path_factory.mktemp("models") / "thousandth"
    return tiny.flux(folder, doubles=10, singles=19, heads=5, text=96, text_layers=24)


def asked(name: str = "flux", **more: Any) -> Request:
    family = FAMILIES[name]
    size = more.pop("size", family.size)
    return Request("a red circle", *size, **{"steps": family.steps, "guidance": family.guidance, "seed": 7,
                                             "text_tokens": family.text_tokens} | more)


def hypothetical(
    model: Path, machine: str, name: str = "flux", cache: PlanCache | None = None, **more: Any
) -> Plan:
    """The plan for a machine that is not here, made in less than five seconds."""
    start = time.process_time()
    job = make_plan(Job(name, [asked(name)], model=model, **{"modulation_table": False} | more), machine=machine,
                    cache=cache)
    assert time.process_time() - start < 5
    return job


def strategy(job: Plan, stage: str) -> str:
    """The name of the strategy that a stage is placed by."""
    return job.strategies[stage][-1].name


def test_hand_arithmetic_of_flux() -> None:
    """The 23.80 GB of the transformer are its blocks and 0.13 GB besides."""
    assert abs(FLUX - 19 * DOUBLE - 38 * SINGLE - 0.128 * GB) < 0.002 * GB
    assert abs(DOUBLE - 0.680 * GB) < 0.001 * GB > abs(SINGLE - 0.283 * GB)


def test_flux_on_two_cards_of_16_gb(flux_dev: Path) -> None:
    """Encoders 9.77 of 14.93 GB; the transformer 11.9 + 11.9 of 14.93 each, with 0.5 for activations."""
    job = hypothetical(flux_dev, "2x16GB")
    assert job.needs["encode"]["cuda:0"].weights == T5 + CLIP
    assert [strategy(job, stage) for stage in ("encode", "denoise", "decode")] == ["resident", "sharded", "resident"]
    assert str(job.places["denoise", "transformer"].placement) == "cuda:0:9,cuda:1:28,cuda:0:20"
    need = job.needs["denoise"]
    assert need["cuda:1"].weights == 10 * DOUBLE + 18 * SINGLE
    assert need["cuda:0"].weights == FLUX - need["cuda:1"].weights
    assert {device: job.machine[device].room for device in need} == dict.fromkeys(need, 16 * GB - GIB)
    assert all(0.4 * GB < one.activations < 0.6 * GB and one.total < 16 * GB - GIB for one in need.values())
    assert "22.2 GiB of weights on one device; cuda:0 has 13.4 GiB for them" in job.strategies["denoise"][0].refused


def test_flux_on_one_card_of_24_gb(flux_dev: Path) -> None:
    """24 GB are 22.93 without the runtime's share, which is less than 23.80; 24 GiB are 24.70, which is enough."""
    with pytest.raises(NoStrategyFits, match=r"denoise does not fit\.\n  resident: 22\.2 GiB .* cuda:0 has 20\.9 GiB"):
        hypothetical(flux_dev, "1x24GB")
    job = hypothetical(flux_dev, "1x24GiB")
    assert strategy(job, "denoise") == "resident" and job.needs["denoise"]["cuda:0"].weights == FLUX


def test_flux_with_the_modulation_table(flux_dev: Path) -> None:
    """6.56 GB of the 23.80 see only conditioning: 17.24 GB go on one card of 24 GB, and on cards of 16 and 8 GB."""
    job = hypothetical(flux_dev, "1x24GB", modulation_table=True)
    need = job.needs["denoise"]["cuda:0"]
    assert strategy(job, "denoise") == "resident" and abs(need.weights - 17.24 * GB) < 0.01 * GB
    two = hypothetical(flux_dev, "16GB+8GB", modulation_table=True)
    assert strategy(two, "denoise") == "sharded"
    assert sum(n.weights for n in two.needs["denoise"].values()) == need.weights


def test_flux_on_cards_of_16_and_8_gb(flux_dev: Path) -> None:
    """14.93 + 6.93 - 2 x 0.5 GB leave 20.9 for 23.8; with 4.7 GB in host memory, 0.68 pass through each card."""
    with pytest.raises(NoStrategyFits, match=r"13\.4 GiB \+ 6\.0 GiB = 19\.4 GiB") as refused:
        hypothetical(flux_dev, "16GB+8GB")
    assert refused.value.fixes == (Fix("allow_offload", "cpu"),)
    job = hypothetical(flux_dev, "16GB+8GB", allow_offload="cpu")
    need = job.needs["denoise"]
    assert strategy(job, "denoise") == "streamed" and sum(one.weights for one in need.values()) == FLUX
    assert need["cpu"].weights == pytest.approx(FLUX - (16 * GB + 8 * GB - 2 * GIB - 2 * (DOUBLE + GB // 2)), rel=0.1)
    assert need["cuda:0"].total < 16 * GB - GIB and need["cuda:1"].total < 8 * GB - GIB


def test_flux_on_four_cards_of_12_gb(flux_dev: Path) -> None:
    """10.93 - 0.5 GB each: three are enough for 23.8 GB, and four of use when there are four requests."""
    job = hypothetical(flux_dev, "4x12GB")
    assert str(job.places["denoise", "transformer"].placement) == "cuda:0:9,cuda:1:19,cuda:2:19,cuda:0:10"
    assert job.needs["denoise"]["cuda:2"].weights == 19 * SINGLE
    busy = hypothetical(flux_dev, "4x12GB", lanes=2).places["denoise", "transformer"].placement
    assert isinstance(busy, Sharded) and len(set(busy.devices.values())) == 3
    busy = hypothetical(flux_dev, "4x12GB", lanes=4).places["denoise", "transformer"].placement
    assert isinstance(busy, Sharded) and len(set(busy.devices.values())) == 4


def test_flux_on_two_cards_of_8_gb(flux_dev: Path) -> None:
    """T5 alone has more than a card: it is sharded; 2 x 6.4 GB are not enough for the transformer."""
    with pytest.raises(NoStrategyFits, match=r"6\.0 GiB \+ 6\.0 GiB = 12\.0 GiB") as refused:
        hypothetical(flux_dev, "2x8GB")
    assert refused.value.fixes == (Fix("allow_offload", "cpu"),)
    job = hypothetical(flux_dev, "2x8GB", allow_offload="cpu")
    encode = job.places["encode", "text_encoder_2"].placement
    assert isinstance(encode, Sharded) and len(set(encode.devices.values())) == 2
    assert sum(one.weights for one in job.needs["encode"].values()) == T5 + CLIP
    assert all(job.needs["encode"][name].total < 8 * GB - GIB for name in ("cuda:0", "cuda:1"))


def test_flux_on_one_card_of_16_gb(flux_dev: Path) -> None:
    """14.4 GB for weights, of which one block of 0.68 passes: 13.7 stay, and 10.1 of the 23.8 wait."""
    job = hypothetical(flux_dev, "1x16GB", allow_offload="cpu")
    need = job.needs["denoise"]
    assert need["cpu"].weights == pytest.approx(FLUX - (16 * GB - GIB - DOUBLE - GB // 2), rel=0.05)
    says = r"9\.\d GiB of transformer would wait in host memory, which has 4\.0 GiB"
    with pytest.raises(NoStrategyFits, match=says):
        hypothetical(flux_dev, "1x16GB", allow_offload="cpu", max_memory="cpu=4GiB")


def test_plans_that_share_what_they_know_are_those_that_do_not(flux_dev: Path) -> None:
    """Blocks that one plan went through cost the same in another one, on whichever card, and with some in the host."""
    cache = PlanCache()
    hypothetical(flux_dev, "1x24GiB", cache=cache)
    alone = hypothetical(flux_dev, "3x8GB", allow_offload="cpu")
    shared = hypothetical(flux_dev, "3x8GB", allow_offload="cpu", cache=cache)
    assert (shared.needs, shared.places, shared.strategies) == (alone.needs, alone.places, alone.strategies)
    assert {strategy(shared, "denoise"), strategy(shared, "encode")} == {"streamed", "sharded"}
    count = len(cache.estimates)
    assert hypothetical(flux_dev, "3x8GB", allow_offload="cpu", cache=cache).needs == alone.needs
    assert len(cache.estimates) == count


def test_what_an_error_names_makes_it_fit(flux_dev: Path) -> None:
    with pytest.raises(NoStrategyFits, match="it fits without max_memory") as refused:
        hypothetical(flux_dev, "2x16GB", max_memory="10GiB")
    assert refused.value.fixes == (Fix("max_memory"),)
    assert strategy(hypothetical(flux_dev, "2x16GB"), "denoise") == "sharded"


def test_the_demo_checkpoint_runs_under_names_of_its_own_pipeline_alone() -> None:
    with pytest.raises(ModelError, match="demo is a FluxPipeline, but family sd3 runs a StableDiffusion3Pipeline"):
        make_plan(Job("sd3", ["a fox"], model="demo"))
    assert make_plan(Job("flux-schnell", ["a fox"], model="demo")).family.name == "demo"


def test_other_families_of_real_size(tmp_path: Path) -> None:
    """Stable Diffusion 3.5 Large 16.29 GB, Qwen-Image 40.86 and 16.58, FLUX.2-dev 64.45 and 48.02."""
    job = hypothetical(sparse.sd35_large(tmp_path / "sd3"), "2x16GB", "sd3")
    placement = job.places["denoise", "transformer"].placement
    assert isinstance(placement, Sharded)
    assert [list(placement.devices.values()).count(card) for card in ("cuda:0", "cuda:1")] == [19, 19]
    assert sum(one.weights for one in job.needs["denoise"].values()) == 16_292_561_536

    job = hypothetical(sparse.qwen_image(tmp_path / "qwen"), "2x24GiB", "qwen-image")
    placement = job.places["denoise", "transformer"].placement
    assert isinstance(placement, Sharded) and len(placement.devices) == 60
    assert sum(one.weights for one in job.needs["denoise"].values()) == 40_860_802_176
    assert job.needs["encode"]["cuda:0"].weights == 16_584_333_984

    job = hypothetical(sparse.flux2_dev(tmp_path / "flux2"), "4x24GiB", "flux2")
    need = job.needs["denoise"]
    assert sum(one.weights for one in need.values()) == 64_446_562_304 and len(need) == 3
    assert sum(one.weights for one in job.needs["encode"].values()) == 48_022_723_328
    assert all(one.total <= 23 * GIB for one in need.values())


def test_flux_at_2048_decodes_in_tiles_only_where_it_must(flux_dev: Path) -> None:
    request = asked(size=(2048, 2048))
    assert make_plan(Job("flux", [request], model=flux_dev, modulation_table=False), machine="2x24GB").tile is None
    job = make_plan(Job("flux", [request], model=flux_dev, modulation_table=False), machine="3x11GB")
    assert job.tile == 1024 and strategy(job, "decode") == "tiles of 1024 pixels"
    assert "decode" in job.strategies and "for activations" in job.strategies["decode"][0].refused


def test_types_follow_the_cards(flux_dev: Path) -> None:
    """Without bfloat16 T5 has 19 GB in float32, and is dealt over both cards; only the denoiser is in float16."""
    old = "2x16GB,ram=64GB,no-bf16"
    job = make_plan(Job("flux", [asked()], model=flux_dev, modulation_table=False), machine=old)
    assert {name: place.dtype for (_, name), place in job.places.items()} == {
        "text_encoder": torch.float32, "text_encoder_2": torch.float32, "transformer": torch.float16,
        "vae": torch.float32,
    }
    assert job.reasons["denoise", "transformer"] == "cuda:0 has no bfloat16, and the model guards against overflow"
    # CLIP's 77 positions are whole numbers, and no wider.
    assert sum(one.weights for one in job.needs["encode"].values()) == 2 * (T5 + CLIP) - 77 * 8
    assert strategy(job, "encode") == "sharded"
    wished = make_plan(Job("flux", [asked()], model=flux_dev, dtype={"vae": torch.float16},
                           modulation_table=False), machine=old)
    assert wished.places["decode", "vae"].dtype == torch.float16 and wished.reasons["decode", "vae"] == "asked for"


def test_places_that_are_asked_for(flux_dev: Path) -> None:
    place = ["encode.text_encoder_2=1", "denoise=0:10,1:27,0:20", "decode=cuda:1"]
    job = hypothetical(flux_dev, "2x16GB", place=place)
    assert job.places["encode", "text_encoder_2"].placement == Resident("cuda:1")
    assert job.places["decode", "vae"].placement == Resident("cuda:1")
    assert str(job.places["denoise", "transformer"].placement) == "cuda:0:10,cuda:1:27,cuda:0:20"
    for place, why in (
        ("denoise=0:10,1:27", "places 37 blocks; transformer has 57"), ("denoise=2", "cannot go to '2'"),
        ("paint=0", "a stage of encode, denoise, decode"), ("encode.unet=0", "no component unet"),
        ("denoise", "write STAGE=WHERE"),
    ):
        with pytest.raises(ValueError, match=why):
            hypothetical(flux_dev, "2x16GB", place=[place])
    with pytest.raises(NoStrategyFits, match="as placed: cuda:0 lacks 8"):
        hypothetical(flux_dev, "2x16GB", place=["denoise=0"])


def test_the_plan_is_for_the_largest_request_of_all() -> None:
    wide, long = asked(size=(1024, 512), text_tokens=64), asked(size=(256, 256), steps=1)
    most = largest([wide, replace(long, prompt="a red circle on a blue background")])
    assert (most.width, most.height, most.text_tokens, most.steps) == (1024, 512, 512, 28)
    assert most.prompt == "a red circle on a blue background"


def test_too_many_text_tokens_are_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="513 text tokens: the text encoder of flux takes at most 512"):
        make_plan(Job("flux", [asked(text_tokens=513)], model="no/such-model"))


# -- on simulated cards, where a plan is also run


def small(model: Path, devices: list[str], **more: Any) -> Plan:
    request = asked(size=more.pop("size", (64, 48)), steps=2, text_tokens=32)
    more = {"modulation_table": False} | more
    return make_plan(Job("flux", [request], model=model, devices=devices, dtype={"": torch.float32}, **more))


def measured(job: Plan) -> tuple[dict[str, dict[str, int]], np.ndarray]:
    """Peak bytes by stage and device, and the picture."""
    report = run_all(job)
    return {stage.stage: dict(stage.peak) for stage in report.stages}, report.pictures[0].pixels


def agree(job: Plan, peaks: dict[str, dict[str, int]]) -> None:
    """Predicted is never below measured, nor more than a tenth above, and within the card's room."""
    for stage, needs in job.needs.items():
        for device in job.devices:
            predicted = needs[device].running if device in needs else 0
            assert peaks[stage][device] <= predicted <= 1.1 * peaks[stage][device], (stage, device)
            assert device not in needs or needs[device].total <= job.machine[device].room


@pytest.mark.parametrize("size", [(32, 32), (128, 96), (256, 128), (160, 320), (384, 384)], ids=str)
def test_activations_are_predicted_on_one_card(
    thousandth: Path, cards: Cards, sim: ModuleType, size: tuple[int, int]
) -> None:
    job = small(thousandth, cards(64 * MIB), size=size)
    agree(job, measured(job)[0])


@pytest.mark.parametrize("limits", [(16, 16), (16, 8), (8, 16), (7, 7, 7)], ids=str)
def test_plans_for_scaled_down_cards_run_as_planned(
    thousandth: Path, cards: Cards, sim: ModuleType, limits: tuple[int, ...]
) -> None:
    expected = measured(small(thousandth, cards(64 * MIB)))[1]
    job = small(thousandth, cards(*(limit * 10**6 for limit in limits)))
    assert strategy(job, "denoise") == "sharded"
    peaks, picture = measured(job)
    agree(job, peaks)
    assert np.array_equal(picture, expected)
    assert all(peaks[stage][f"sim:{i}"] <= limit * 10**6 for stage in peaks for i, limit in enumerate(limits))


def test_encoders_that_do_not_fit_a_card_are_dealt_like_a_denoiser(
    thousandth: Path, cards: Cards, sim: ModuleType
) -> None:
    expected = measured(small(thousandth, cards(64 * MIB)))[1]
    job = small(thousandth, cards(*[5 * 10**6] * 5))
    assert strategy(job, "encode") == "sharded"
    peaks, picture = measured(job)
    agree(job, peaks)
    assert np.array_equal(picture, expected)


def test_what_does_not_fit_is_streamed_only_when_allowed(thousandth: Path, cards: Cards, sim: ModuleType) -> None:
    expected = measured(small(thousandth, cards(64 * MIB)))[1]
    devices = cards(8 * 10**6)
    with pytest.raises(NoStrategyFits, match="allow_offload='cpu'"):
        small(thousandth, devices)
    job = small(thousandth, devices, allow_offload="cpu")
    assert job.needs["denoise"]["cpu"].weights > 8 * 10**6
    peaks, picture = measured(job)
    agree(job, peaks)
    assert np.array_equal(picture, expected)


def test_what_not_even_host_memory_holds_is_read_from_the_disk(
    thousandth: Path, cards: Cards, sim: ModuleType
) -> None:
    """17 MB of transformer: 8 on the card, 3 in host memory, and the rest read from the files in every step."""
    expected = measured(small(thousandth, cards(64 * MIB)))[1]
    devices = cards(8 * 10**6)
    with pytest.raises(NoStrategyFits, match=r"which has 2\.9 MiB for it\n-> it fits without max_memory") as refused:
        small(thousandth, devices, allow_offload="cpu", max_memory="cpu=3MB")
    assert refused.value.fixes == (Fix("max_memory"),)
    job = small(thousandth, devices, allow_offload="disk", max_memory="cpu=3MB")
    need = job.needs["denoise"]
    assert 2 * 10**6 < need["cpu"].weights <= 3 * 10**6 and need["disk"].weights > 5 * 10**6
    assert job.reads == {"encode": 0, "denoise": need["disk"].weights, "decode": 0}
    peaks, picture = measured(job)
    agree(job, peaks)
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize("limits", [(64,), (9, 9), (8,)], ids=str)
def test_with_the_modulation_table_plans_hold_too(
    thousandth: Path, cards: Cards, sim: ModuleType, limits: tuple[int, ...]
) -> None:
    """4.6 of 17 MB are never loaded: resident, dealt over two cards, and partly streamed."""
    expected = measured(small(thousandth, cards(64 * MIB)))[1]
    job = small(thousandth, cards(*(limit * 10**6 for limit in limits)), modulation_table=True, allow_offload="cpu")
    assert strategy(job, "denoise") == {64: "resident", 9: "sharded", 8: "streamed"}[limits[0]]
    peaks, picture = measured(job)
    agree(job, peaks)
    assert np.array_equal(picture, expected)


def test_cards_that_compute_with_less_than_one_alone_are_used(tmp_path: Path, cards: Cards, sim: ModuleType) -> None:
    """With all activations of denoise in reserve the first card has no room for a block, though it takes fewer."""
    model = tiny.flux(tmp_path / "model", guidance=False, doubles=4, singles=8, heads=8)
    cards(64 * MIB, 64 * MIB)
    request = replace(asked("flux-schnell"), width=64, height=64, steps=1, text_tokens=8)
    job = Job("flux-schnell", [request], model=model, dtype="float32", allow_offload="cpu", lanes=2)
    ample = make_plan(job)
    expected = run_all(ample).pictures[0].pixels
    block = max(ample.weights["denoise", "transformer"].blocks.values())
    limit = block + ample.needs["denoise"]["sim:0"].activations * 3 // 4
    tight = make_plan(replace(job, max_memory=f"0={limit}B,1={block * 18 // 5}B"))
    assert strategy(tight, "denoise") == "streamed"
    peaks, picture = measured(tight)
    assert np.array_equal(picture, expected)
    for stage, needs in tight.needs.items():
        for device, need in needs.items():
            assert peaks[stage].get(device, 0) <= need.total <= (tight.machine.room(device) or 2**62)


def test_what_trying_copies_between_cards_takes_is_planned(flux: Path, cards: Cards, sim: ModuleType) -> None:
    devices = cards(64 * MIB, 64 * MIB)
    assert corrupted_pairs(devices) == []
    assert [torch.accelerator.max_memory_allocated(device) for device in devices] == [PATTERN_BYTES] * 2
    two = {"place": ["denoise=0:3,1:3"], "devices": devices}
    needs = small(flux, **two).needs["denoise"]
    assert min(need.weights for need in needs.values()) < PATTERN_BYTES
    assert min(need.total for need in needs.values()) == PATTERN_BYTES
    small(flux, **two, max_memory=f"{PATTERN_BYTES}B")
    with pytest.raises(DoesNotFit, match="denoise"):
        small(flux, **two, max_memory=f"{PATTERN_BYTES - 1}B")
    # One card copies nothing.
    one = small(flux, [devices[0]])
    assert max(need["sim:0"].total for need in one.needs.values()) < PATTERN_BYTES


def test_a_card_too_small_for_a_whole_picture_decodes_it_in_tiles(
    thousandth: Path, cards: Cards, sim: ModuleType
) -> None:
    devices = cards(64 * MIB, 64 * MIB)
    whole = small(thousandth, devices, size=(512, 512), place=["decode=1"])
    limit = whole.needs["decode"]["sim:1"].total * 2 // 3
    places = ["encode=0", "denoise=0", "decode=1"]
    job = small(thousandth, devices, size=(512, 512), max_memory=f"1={limit}B", place=places)
    assert (whole.tile, job.tile) == (None, 256)
    report = run_all(job)
    peaks, picture = {stage.stage: dict(stage.peak) for stage in report.stages}, report.pictures[0].pixels
    assert card_of(job.requests[0], report.pictures[0].facts)["tile"] == 256
    assert peaks["decode"]["sim:1"] <= limit
    agree(job, peaks)
    # Neighboring tiles are blended, so the picture is another one, but not by much.
    assert 0 < np.abs(picture.astype(int) - measured(whole)[1]).mean() < 20


@pytest.mark.parametrize(
    ("name", "build", "tokens"),
    [("flux2-klein", families.klein, 64), ("qwen-image", families.qwen_image, 224), ("sd3", families.sd3, 64),
     ("z-image", families.z_image, 64)],
)
def test_every_family_is_planned_and_dealt(
    tmp_path: Path, cards: Cards, sim: ModuleType, name: str, build: Callable[[Path], Path], tokens: int
) -> None:
    model, devices = build(tmp_path / name), cards(64 * MIB, 64 * MIB)
    request = asked(name, size=(64, 48), steps=2, text_tokens=tokens)
    pictures = []
    for place in ((), ("encode=sharded", "denoise=sharded")):
        job = make_plan(Job(name, [request], model=model, devices=devices, dtype={"": torch.float32}, place=place))
        store, peaks = MemoryStore(warn=print), {}
        for stage in ("encode", "denoise", "decode"):
            # Qwen-Image's positions stay in a cache of the library's, whatever becomes of the model.
            held = {device: torch.accelerator.memory_allocated(device) for device in devices}
            for device in devices:
                torch.accelerator.reset_peak_memory_stats(device)
            (state,) = run_stage(job, stage, store=store)
            peaks[stage] = {device: torch.accelerator.max_memory_allocated(device) - held[device] for device in held}
        agree(job, peaks)
        pictures.append(state.tensors()["pixels"])
    assert isinstance(job.places["denoise", "transformer"].placement, Sharded)
    assert torch.equal(*pictures)


def test_limits_of_the_user_hold(thousandth: Path, cards: Cards, sim: ModuleType) -> None:
    job = small(thousandth, cards(64 * MIB, 64 * MIB), max_memory="12MB")
    assert strategy(job, "denoise") == "sharded"
    peaks, _ = measured(job)
    assert all(peak <= 12 * 10**6 for stage in peaks.values() for peak in stage.values())


def test_a_plan_on_the_host_is_resident_and_in_float32(flux: Path) -> None:
    job = make_plan(Job("flux", [asked(size=(64, 48), steps=1)], model=flux, devices=["cpu"]))
    assert {str(place.placement) for place in job.places.values()} == {"cpu"}
    assert {place.dtype for place in job.places.values()} == {torch.float32}
    with pytest.raises(NoStrategyFits, match="on one device; cpu has"):
        make_plan(Job("flux", [asked(size=(64, 48))], model=flux, devices=["cpu"], max_memory="100KB"))


def test_planning_changes_nobodys_random_numbers(flux: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_plan(Job("flux", [asked(size=(64, 48))], model=flux, devices=["cpu"]))
    assert torch.equal(torch.rand(4), expected)
