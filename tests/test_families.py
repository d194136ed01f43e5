"""Every family that is named runs staged as it runs whole, bit for bit; the rest is refused by name."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import (
    MODULAR_PIPELINE_MAPPING,
    LoopSequentialPipelineBlocks,
)

from runner import Job, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.request import requests_for
from stages.errors import ModelError
from stages.families import FAMILIES
from stages.models.checkpoint import Checkpoint, check_family, find
from stages.pipeline.split import _groups, split
from stages.state import State, Value
from tests import tiny_families as tiny
from tests.staging import run_staged, run_whole

INPUTS: dict[str, Value] = {
    "prompt": "a red circle", "width": 64, "height": 48, "num_inference_steps": 2, "seed": 7,
}


@dataclass(frozen=True)
class Case:
    """A family, its tiny checkpoint, and a guidance other than none if it takes one."""

    family: str
    build: Callable[[Path], Path]
    guidance: float | None
    tokens: int = 64

    def inputs(self, **changes: Value) -> dict[str, Value]:
        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return INPUTS | {"max_sequence_length": self.tokens} | guidance | changes


# Where there are 224 tokens the template alone has near 200 bytes, and a byte is a token of the tiny tokenizers.
CASES = {
    "flux2": Case("flux2", tiny.flux2, 4.0, tokens=224),
    "flux2-klein": Case("flux2-klein", tiny.klein, None),
    "flux2-klein-base": Case("flux2-klein-base", lambda folder: tiny.klein(folder, distilled=False), 4.0),
    "qwen-image": Case("qwen-image", tiny.qwen_image, 4.0, tokens=224),
    "sd3": Case("sd3", tiny.sd3, 5.0),
    "z-image": Case("z-image", tiny.z_image, None),
    # The base model of Z-Image takes the guidance that Turbo ships without.
    "z-image-base": Case("z-image", tiny.z_image, 4.0),
}


@dataclass(frozen=True)
class Staged:
    """A tiny model, and per stage the artifacts of a staged run, `asked` last and its variations before it."""

    case: Case
    model: Path
    artifacts: Mapping[str, Sequence[State]]


@pytest.fixture(scope="module", params=CASES)
def staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Staged:
    case = CASES[request.param]
    model = case.build(tmp_path_factory.mktemp(request.param) / "model")
    variations = [case.inputs(prompt="two small green squares")]
    if case.guidance is not None:
        variations.append(case.inputs(guidance_scale=2.0))
    return Staged(case, model, run_staged(model, [*variations, case.inputs()]))


def test_staged_equals_the_unsplit_pipeline(staged: Staged) -> None:
    # Without a negative prompt SD3 guides by nothing: see test_upstream.
    negative: dict[str, Value] = {"negative_prompt": ""} if staged.case.family == "sd3" else {}
    pixels, kept = run_whole(staged.model, staged.case.inputs(**negative))
    assert torch.equal(staged.artifacts["decode"][-1].tensors()["pixels"], pixels)
    for stage, keep in kept.items():
        artifact = staged.artifacts[stage][-1].tensors()
        assert artifact
        for path, tensor in artifact.items():
            assert torch.equal(tensor, keep.values[path]), (stage, path)


def test_the_prompt_and_the_guidance_reach_the_latents(staged: Staged) -> None:
    """Pixels hide what a tiny random model makes of a prompt, so its latents are compared."""
    latents = [state.tensors()["latents"] for state in staged.artifacts["denoise"]]
    assert len(latents) == (2 if staged.case.guidance is None else 3)
    for index, one in enumerate(latents):
        assert not any(torch.equal(one, other) for other in latents[:index])


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.negative])
def test_a_negative_prompt_leads_away_as_in_the_unsplit_pipeline(family: str, tmp_path: Path) -> None:
    """Through requests: as the plan, the keys and the stages see it."""
    case = CASES[family]
    model = case.build(tmp_path / "model")
    requests = [request for negative in ("", "two small green squares") for request in requests_for(
        "a red circle", FAMILIES[family], size=(64, 48), steps=2, guidance=case.guidance, seed=7,
        text_tokens=case.tokens, negative_prompt=negative, index=len(negative[:1]))]
    job = make_plan(Job(family, requests, model=model, dtype={"": torch.float32}, devices=["cpu"]))
    store = MemoryStore(warn=print)
    report = run_all(job, store=store)
    pixels, kept = run_whole(model, case.inputs(negative_prompt="two small green squares"))
    assert torch.equal(torch.from_numpy(report.pictures[1].pixels), pixels)
    plain, away = (state.tensors()["latents"] for key in report.keys["denoise"] if (state := store.get(key)))
    assert torch.equal(away, kept["denoise"].values["latents"]) and not torch.equal(plain, away)
    # The table of the denoiser is told what it will be told.
    loaded = make_plan(Job(family, requests, model=model, dtype={"": torch.float32}, devices=["cpu"],
                           modulation_table=False))
    assert torch.equal(torch.from_numpy(run_all(loaded).pictures[1].pixels), pixels)


def test_a_family_says_whether_it_reads_a_negative_prompt(staged: Staged) -> None:
    encode, *_ = split(find(staged.model), list(staged.case.inputs()))
    # Z-Image Turbo reads one, and is distilled to go without guidance.
    reads = "negative_prompt" in encode.blocks.input_names and staged.case.family != "z-image"
    assert FAMILIES[staged.case.family].negative is reads


def test_guidance_is_an_input_of_every_stage_that_it_changes(staged: Staged) -> None:
    """The key of an artifact has the inputs of its stage: without this one, another guidance would find the old."""
    stages = {stage.name: stage for stage in split(find(staged.model), list(staged.case.inputs()))}
    assert "guidance_scale" not in stages["decode"].inputs
    assert ("guidance_scale" in stages["denoise"].inputs) == (staged.case.family != "flux2-klein")
    guided = {"z-image", "qwen-image", "flux2-klein-base"}
    assert ("guidance_scale" in stages["encode"].inputs) == (staged.case.family in guided)


def test_the_model_is_of_its_family_and_tells_its_scale_factor(staged: Staged) -> None:
    checkpoint = find(staged.model)
    check_family(checkpoint, family=FAMILIES[staged.case.family])
    assert split(checkpoint, list(INPUTS))[1].scale_factor == 8


def test_every_family_with_a_name_has_a_case() -> None:
    assert {case.family for case in CASES.values()} | {"flux", "flux-schnell", "demo"} == set(FAMILIES)


def test_an_input_that_the_family_does_not_read_is_refused(tmp_path: Path) -> None:
    checkpoint = find(tiny.klein(tmp_path / "klein"))
    with pytest.raises(ValueError, match="Flux2KleinPipeline has no use for guidance_scale: leave it out"):
        split(checkpoint, [*INPUTS, "guidance_scale"])


def test_a_model_that_makes_videos_is_refused(tmp_path: Path) -> None:
    checkpoint = find(tiny.wan(tmp_path / "wan"))
    with pytest.raises(ModelError, match="WanPipeline makes videos, not images"):
        split(checkpoint, list(INPUTS))


def test_a_model_without_pipeline_blocks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ModelError, match="has no modular blocks for PixArtAlphaPipeline"):
        split(Checkpoint(tmp_path, "pixart", "sha256:0", "PixArtAlphaPipeline", {}), list(INPUTS))


def test_the_rule_of_the_split_covers_every_family_of_diffusers() -> None:
    """Before `denoise`, `denoise` with its one loop, after it; all 34 families and their variants."""
    names = {choose() for choose in MODULAR_PIPELINE_MAPPING.values()}
    assert len(MODULAR_PIPELINE_MAPPING) == len(names) == 34
    names |= {name for name in dir(diffusers) if re.fullmatch(r"\w+ModularPipeline", name)}
    others = {}
    for name in names:
        groups = _groups(getattr(diffusers, name)().blocks, list(INPUTS))
        assert all(groups[stage].sub_blocks for stage in ("encode", "denoise", "decode")), name
        loops = [block for block in groups["denoise"].sub_blocks.values()
                 if isinstance(block, LoopSequentialPipelineBlocks)]
        assert len(loops) == 1, name
        if "images" not in groups["decode"].output_names:
            others[name.removesuffix("ModularPipeline")] = groups["decode"].output_names[0]
    assert others == OTHERS


# What we refuse by name, because it makes no images.
OTHERS = {
    "Cosmos3Distilled": "videos", "Cosmos3Omni": "videos", "Echo": "videos", "Helios": "videos",
    "HeliosPyramid": "videos", "HeliosPyramidDistilled": "videos", "HunyuanVideo15": "videos", "LTX": "videos",
    "LTX2": "videos", "LTX25": "videos", "MiniMaxH3": "videos", "MiniMaxMusic3": "audios", "Wan": "videos",
    "Wan22": "videos", "Wan22Image2Video": "videos", "Wan22Vace": "videos", "WanAnimate2": "videos",
    "WanAnimate2Distilled": "videos", "WanImage2Video": "videos",
}
