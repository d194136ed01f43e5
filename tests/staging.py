"""A model run stage by stage, and whole: what the tests of families compare."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from runner import Plan
from runner.artifacts import MemoryStore, key_of
from stages.models.checkpoint import find
from stages.pipeline.split import split
from stages.pipeline.stage import Stage
from stages.placement.placement import Place, Places, Resident
from stages.state import State, Value


def on_host(stages: Sequence[Stage], dtype: torch.dtype = torch.float32) -> Places:
    """Every component on the host."""
    return {part.name: Place(Resident("cpu"), dtype) for stage in stages for part in stage.components}


def named(plan: Plan, run: str) -> Plan:
    """The plan of a run of this name."""
    return replace(plan, job=replace(plan.job, run=run))


def run_staged(model: Path, requests: Sequence[Mapping[str, Value]]) -> dict[str, list[State]]:
    """Per stage the artifacts of the requests, each read back from the store before the next stage begins."""
    stages = split(find(model), list(requests[0]))
    store, before, artifacts = MemoryStore(warn=print), [State() for _ in requests], {}
    for stage in stages:
        keys = [key_of({"stage": stage.name, "index": index}) for index, _ in enumerate(requests)]
        with stage.loaded(on_host(stages)) as loaded:
            for key, state, inputs in zip(keys, before, requests, strict=True):
                store.put(key, stage.name, loaded.run(state, inputs), {})
        before = artifacts[stage.name] = [stored for key in keys if (stored := store.get(key)) is not None]
    return artifacts


class Keep(ModularPipelineBlocks):
    """A pipeline block that keeps the values that pass it."""

    model_name = "test"

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Keep":
        return self

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        self.values = State(dict(state.values)).tensors()
        return components, state


def run_whole(model: Path, inputs: Mapping[str, Value]) -> tuple[torch.Tensor, dict[str, Keep]]:
    """The unsplit modular pipeline's picture, uint8 [height, width, 3], and its values where we split it."""
    blocks = ModularPipeline.from_pretrained(str(model)).blocks
    kept = {"encode": Keep(), "denoise": Keep()}
    for offset, (name, keep) in enumerate(kept.items()):
        blocks.sub_blocks.insert(f"after_{name}", keep, list(blocks.sub_blocks).index("denoise") + offset)
    pipe = blocks.init_pipeline(str(model))
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return picture_of(pipe, inputs), kept


def picture_of(pipe: ModularPipeline, inputs: Mapping[str, Value]) -> torch.Tensor:
    """The picture that a loaded modular pipeline makes, uint8 [height, width, 3]."""
    given = dict(inputs)
    if "guider" in pipe.components:
        scale = {"guidance_scale": given.pop("guidance_scale")} if "guidance_scale" in given else {}
        pipe.update_components(guider=pipe.guider.new(enabled=bool(scale), **scale))
    generator = torch.Generator("cpu").manual_seed(given.pop("seed"))
    images = pipe(**given, output_type="pt", generator=generator, output="images")
    pixels: torch.Tensor = (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    return pixels
