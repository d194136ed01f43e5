"""The models of the sweep: what they need, and the pictures of their unsplit pipelines, each made once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import FluxPipeline, ModularPipeline

from runner import Job, Request, make_plan, run_all
from runner.request import requests_for
from stages.families import FAMILIES
from stages.pipeline.stage import guides
from stages.placement.tiling import set_tile
from tests import tiny, tiny_families
from tests.staging import picture_of

Pixels = npt.NDArray[Any]
AMPLE = 2**31
SCALE = 0.8


@dataclass(frozen=True)
class Kind:
    """A tiny model, and the family that runs it."""

    family: str
    """The name of the family on the command line, which also decides how many tokens a prompt has."""
    build: Callable[[Path], Path]
    """Makes the model in a folder."""
    weight: int = 2
    """How often it is chosen, beside the others."""
    lora: bool = False
    """Whether there is a LoRA for it."""
    fewest: int = 1
    """The fewest steps that its scheduler makes."""


# None is called "demo", which the command line takes for the model that comes with it. Where there are more than a few
# tokens, most of what there is are the activations of encode.
KINDS: Mapping[str, Kind] = {
    "demo-small": Kind("demo", partial(tiny.flux, guidance=False), 1, lora=True),
    "demo-deep": Kind("demo", partial(tiny.flux, guidance=False, doubles=4, singles=8, heads=4), 6, lora=True),
    "demo-text": Kind("demo", partial(tiny.flux, guidance=False, text=128, text_layers=6), 3),
    "schnell": Kind("flux-schnell", partial(tiny.flux, guidance=False, doubles=3, singles=6, heads=3)),
    "flux": Kind("flux", tiny.flux, lora=True),
    "sd3": Kind("sd3", tiny_families.sd3),
    "qwen-image": Kind("qwen-image", tiny_families.qwen_image, fewest=2),
    "klein": Kind("flux2-klein", tiny_families.klein),
    "z-image": Kind("z-image", tiny_families.z_image),
}


@dataclass(frozen=True)
class Facts:
    """What is known of a model before a case is made of it."""

    most: int
    """The most bytes that a stage needs, all on one card."""
    least: int
    """Those that a card needs at least, whatever is dealt over several: activations, and a decoder."""
    denoise: int
    """Those of the weights of denoise."""
    blocks: Mapping[tuple[str, str], int]
    """By stage and component, the blocks that can be placed one by one; 0 where there are none."""


@dataclass
class Models:
    """The models of a folder, made as they are asked for."""

    folder: Path
    """Where they lie, each under its name."""
    facts_of: dict[str, Facts] = field(default_factory=dict)
    """What was found out, by model."""
    pipes: dict[tuple[str, bool], Any] = field(default_factory=dict)
    """Unsplit pipelines by model, with its LoRA or without."""
    pictures: dict[tuple[Any, ...], Pixels] = field(default_factory=dict)
    """Their pictures, by all that decides about them."""

    def path(self, name: str) -> Path:
        """A model."""
        path = self.folder / name
        return path if path.exists() else KINDS[name].build(path)

    def lora(self, name: str) -> Path:
        """A LoRA for a model."""
        path = self.folder / f"{name}-lora.safetensors"
        return path if path.exists() else tiny.lora(path, self.path(name))

    def facts(self, name: str) -> Facts:
        """What a model needs."""
        if name not in self.facts_of:
            from tests import sim

            sim.configure([AMPLE])
            requests = requests_for("a red circle", FAMILIES[KINDS[name].family], size=(64, 48), steps=2, seed=1)
            plan = make_plan(Job(KINDS[name].family, requests, model=self.path(name), dtype="float32"))
            needs = {stage: needs["sim:0"] for stage, needs in plan.needs.items()}
            blocks = {part: 0 if "" in weights.blocks else len(weights.blocks)
                      for part, weights in plan.weights.items()}
            least = max(*(need.activations for need in needs.values()), needs["decode"].total)
            self.facts_of[name] = Facts(max(need.total for need in needs.values()), least, needs["denoise"].weights,
                                        blocks)
        return self.facts_of[name]

    def truth(self, name: str, request: Request, dtype: str, lora: bool, tile: int | None) -> Pixels:
        """The picture of the unsplit pipeline; in another type than float32, that of a run on the CPU."""
        key = (name, replace(request, index=0), dtype, lora, tile)
        if key not in self.pictures:
            make = self._whole if dtype == "float32" else self._staged
            self.pictures[key] = make(name, request, dtype, lora, tile)
        return self.pictures[key]

    def _whole(self, name: str, request: Request, dtype: str, lora: bool, tile: int | None) -> Pixels:
        if (name, lora) not in self.pipes:
            self.pipes[name, lora] = self._fused(name) if lora else self._unsplit(name)
        pipe = self.pipes[name, lora]
        set_tile(pipe.vae, tile)
        if lora:
            # A FLUX without embeddings of guidance takes any.
            images = pipe(request.prompt, width=request.width, height=request.height,
                          guidance_scale=1.0 if request.guidance is None else request.guidance,
                          num_inference_steps=request.steps, max_sequence_length=request.text_tokens,
                          generator=torch.Generator("cpu").manual_seed(request.seed)).images
            return np.asarray(images[0])
        # Without a negative prompt SD3 guides by nothing: see test_upstream.
        negative = {"negative_prompt": ""} if KINDS[name].family == "sd3" and not request.negative_prompt else {}
        # Guidance of 1 or less is none.
        inputs = {key: value for key, value in request.inputs.items()
                  if key != "guidance_scale" or guides(request.inputs) or "guider" not in pipe.components}
        return picture_of(pipe, {**inputs, **negative}).numpy()

    def _unsplit(self, name: str) -> ModularPipeline:
        pipe = ModularPipeline.from_pretrained(str(self.path(name)))
        pipe.load_components(dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _fused(self, name: str) -> FluxPipeline:
        pipe = FluxPipeline.from_pretrained(self.path(name), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        path = self.lora(name)
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="style")
        pipe.set_adapters(["style"], [SCALE])
        pipe.fuse_lora(components=["transformer"])
        return pipe

    def _staged(self, name: str, request: Request, dtype: str, lora: bool, tile: int | None) -> Pixels:
        loras = [f"{self.lora(name)}={SCALE}"] if lora else []
        job = Job(KINDS[name].family, [request], model=self.path(name), dtype=dtype, devices=["cpu"], loras=loras,
                  tile=tile or 0)
        return run_all(make_plan(job)).pictures[0].pixels
