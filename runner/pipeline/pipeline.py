"""A pipeline as users of diffusers expect it: made of a model, called with a prompt."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from PIL.Image import Image

from runner import job_fields as fields_of
from runner.artifacts import Store, Where, open_store
from runner.engine.keys import artifact_keys
from runner.engine.run import facts_of, run_all, run_stage
from runner.events import Emit, silent, tee
from runner.job import STAGES, Job, RunPolicy
from runner.media.image import card_of
from runner.media.pil import image_of
from runner.pipeline import keywords
from runner.pipeline.asked import Asked, requests_of, spend
from runner.pipeline.devices import devices_of, places_of
from runner.pipeline.habits import Habits
from runner.pipeline.model import as_name, family_of, is_model_folder
from runner.pipeline.result import Result
from runner.pipeline.shown import shown
from runner.pipeline.states import States, same
from runner.pipeline.steps import OnStep, StepListener
from runner.placement_options import MemoryLimits, PlaceRequest
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.request import FilledRequest
from stages.errors import BadResult, InvalidInput
from stages.families import FAMILIES, Family
from stages.machine import Machine
from stages.models.lora import LoraRequest
from stages.models.scheduler import SchedulerRequest
from stages.signatures import checked_call
from stages.wording import kind_of

if TYPE_CHECKING:
    from torch import Generator

DType = Mapping[str, str | torch.dtype] | str | torch.dtype | None
ANYTHING = "a picture"


class Pipeline(Habits):
    """A model and how it runs: `pipe = Pipeline("flux")`, then `pipe("a fox").images[0].save("fox.png")`.

    Nothing is loaded before a call, and nothing stays loaded behind it. A call takes what `__call__` below says;
    `pipe.encode`, `pipe.denoise` and `pipe.decode` are its stages one by one, and `print(pipe.plan)` says where all of
    it goes. `family_or_model` is the name of a family (FAMILIES), a hub id or a folder. What a keyword that is left
    out would say, the plan decides. The keywords are::

        model          another model of the family: a hub id, a folder or "demo"
        revision       a commit, tag or branch of a model of the hub
        loras          LoRAs to merge in, such as ["style.safetensors=0.8"]
        scheduler      in the place of the model's: a name such as "UniPCMultistepScheduler", a config, or a scheduler
        dtype          a type for all components, or {component: type}; `torch_dtype` is the same
        devices, gpus  the devices to use, such as "cpu", ["cuda:0"] or "0,1"; by default all cards
        max_memory     the most to use: "14GiB" of each card, {0: "14GiB", "cpu": "24GiB"}, or bytes
        place          where stages go: "denoise=sharded", {"denoise": "0:9,1:28,0:20"}
        device_map     the same in diffusers' words: "balanced" leaves it to the plan, {"vae": 0}, or a device
        allow_offload  "cpu", or "disk", lets blocks that fit no card wait there
        lanes          pictures that are denoised at a time; by default as many as keep the cards busy
        tile           pixels along a side of the tiles that are decoded one by one, 0 for whole pictures; by default
                       those pictures alone are decoded in tiles that do not fit whole
        store          where results of stages are kept: "memory", a folder, a URL, or a store
        policy         a RunPolicy, or in its place its own keywords, such as step_every=60 or strict=True
        progress       True shows how a call goes on, False does not; by default a notebook and a terminal do
        modulation_table, peer_copies
                       False switches them off

    The hub's cache and its token are those of the environment: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN. What pipelines of
    diffusers have besides is either done, or says what does it here: `pipe.to`, `pipe.vae`, `pipe.load_lora_weights`.

    Raises InvalidInput for what cannot be, and ModelError for a model that cannot be read or is of no family.
    """

    @checked_call
    def __init__(
        self,
        family_or_model: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        loras: Iterable[LoraRequest | str | os.PathLike[str]] | None = (),
        scheduler: SchedulerRequest | Mapping[str, Any] | str | object | None = None,
        dtype: DType = None,
        torch_dtype: DType = None,
        devices: Iterable[str | int] | str | int | torch.device = (),
        gpus: Iterable[str | int] | str | int = (),
        max_memory: MemoryLimits | Mapping[str | int, str | int] | str | int | None = None,
        place: Iterable[PlaceRequest | str] | PlaceRequest | Mapping[str, str | int] | str = (),
        device_map: Mapping[str, str | int] | str | int | torch.device | None = None,
        allow_offload: Literal["cpu", "disk"] | None = None,
        lanes: int | None = None,
        tile: int | None = None,
        store: Where = "memory",
        policy: RunPolicy | None = None,
        progress: bool | None = None,
        modulation_table: bool = True,
        peer_copies: bool = True,
        **more: Any,
    ) -> None:
        policies, more = {field.name for field in fields(RunPolicy)}, keywords.asked_for(more, keywords.PIPELINE)
        keywords.refuse([name for name in more if name not in policies], [*_KEYWORDS, *sorted(policies)],
                        {**keywords.PIPELINE, **keywords.COMPONENTS}, "a pipeline")
        if policy is not None and more:
            raise InvalidInput(f"policy and {next(iter(more))} both say how it runs -> leave one of them out")
        if dtype is not None and torch_dtype is not None:
            raise InvalidInput("dtype and torch_dtype are one thing -> leave torch_dtype out")
        policy = RunPolicy(**more) if policy is None else fields_of.of_type("policy", policy, RunPolicy)
        if policy.stop_after is not None:
            raise InvalidInput("a pipeline goes on to the picture -> leave stop_after out; pipe.encode and "
                               "pipe.denoise stop after a stage")
        if progress is not None:
            fields_of.flag("progress", progress)
        name = as_name(family_or_model)
        name, found = (name, None) if name in FAMILIES else family_of(name, revision)
        # Checks all of it now, and not with the first call.
        self._job = Job(
            name, ANYTHING, model=found if model is None else model, revision=revision,
            loras=() if loras is None else loras, scheduler=scheduler,
            dtype=torch_dtype if dtype is None else dtype, devices=devices_of(devices, gpus, device_map),
            max_memory=max_memory, place=places_of(place, device_map), allow_offload=allow_offload, lanes=lanes,
            tile=tile, policy=policy, modulation_table=modulation_table, peer_copies=peer_copies,
            # Other processes cannot have what is in the memory of this one, and keep their work in the user's folder.
            store=store if isinstance(store, str | os.PathLike) and store != "memory" else "",
        )
        self._progress = progress
        self._store = open_store(store, strict=policy.strict)

    @classmethod
    @checked_call
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> "Pipeline":
        """The pipeline of a hub id or a folder, whose own index says of which family it is; see `Pipeline`."""
        name = as_name(model)
        # A folder that happens to have the name of a family.
        return cls(os.path.join(os.curdir, name) if name in FAMILIES and is_model_folder(name) else name, **options)

    def __repr__(self) -> str:
        model = self._job.model or self.family.repo
        return f"Pipeline({self._job.family!r}, model={model!r}, store={self.store!r})"

    @property
    def store(self) -> Store:
        """Where the results of stages are kept."""
        return self._store

    @property
    def family(self) -> Family:
        """The family of the model, with its defaults."""
        return self._job.defaults

    @checked_call
    @keywords.in_words_of_a_call()
    def job_for(self, prompt: str | Sequence[str] | None, **asked: Unpack[Asked]) -> Job:
        """The job of a call with these arguments, for `spawn`, `run_on_ray` and others that do jobs.

        `asked` are the keywords of a call, such as `num_inference_steps=8`, but on_step and emit.
        """
        return replace(self._job, requests=requests_of(self.family, prompt, asked))

    @property
    def plan(self) -> Plan:
        """Where everything goes for a picture with the family's defaults: `print(pipe.plan)`. Nothing is loaded."""
        return self.plan_for(ANYTHING)

    @checked_call
    @keywords.in_words_of_a_call()
    def plan_for(self, prompt: str | Sequence[str] = ANYTHING, *, machine: str | Machine | None = None,
                 **asked: Unpack[Asked]) -> Plan:
        """Where everything would go for a call with these arguments, here or on a machine such as "2x16GB".

        `asked` are the keywords of a call, such as `height=512`, but on_step and emit.
        """
        return make_plan(self.job_for(prompt, **asked), machine=machine, download=False)

    @checked_call
    @keywords.in_words_of_a_call()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: "Generator | Sequence[Generator] | None" = None,
        seed: int | Sequence[int] | None = None,
        max_sequence_length: int | None = None,
        on_step: OnStep | None = None,
        emit: Emit | None = None,
        **unknown: Any,
    ) -> Result:
        """Make pictures; what is not said comes from the family. The names are diffusers'.

        `height` and `width` are in pixels. The noise of each picture has a seed: one that counts up (or is random),
        or a list, or those of fresh generators on the CPU, one for each picture. `on_step(index, step, timestep,
        values)` is called after every step with the number of the picture, the step from 0, the scheduler's timestep
        and {"latents": tensor}; where it gives False the run ends, as Interrupted, and the same call goes on from
        there. `emit(kind, data)` hears of every event. Keywords of diffusers that ask for nothing, such as
        `latents=None`, are taken, too.

        Raises InvalidInput, DoesNotFit, ModelError, StageOutOfMemory, StoreError, or BadResult for a picture that came
        to nothing.
        """
        asked: Asked = {
            "negative_prompt": negative_prompt, "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale, "height": height, "width": width,
            "num_images_per_prompt": num_images_per_prompt, "generator": generator, "seed": seed,
            "max_sequence_length": max_sequence_length,
        }
        job = self.job_for(prompt, **asked, **unknown)
        with self._heard(job, on_step, emit) as listener:
            plan = make_plan(job, shapes=False)
            report = run_all(plan, store=self.store, emit=listener, stop=lambda: listener.stopping)
        if report.failures:
            first, seeds = report.failures[0], [request.seed for request in job.requests]
            raise BadResult(f"picture {first.index} of {len(seeds)} came to nothing: {first.text}; the others are "
                            f"kept, and a call without it finds them with seed={seeds}")
        spend(generator)
        return Result(job.requests, lambda: [picture.image for picture in report.pictures], report)

    @checked_call
    @keywords.in_words_of_a_call()
    def encode(self, prompt: str | Sequence[str] | None = None, *, emit: Emit | None = None,
               **asked: Unpack[Asked]) -> States:
        """The first stage of a call with these arguments: the embeddings, on the host. Nothing stays loaded.

        `asked` are the keywords of a call, such as `seed=7`: what the later stages need of them, the states know.
        """
        plan = make_plan(self.job_for(prompt, **asked), shapes=False)
        with self._heard(plan.job, None, emit) as listener:
            states = run_stage(plan, "encode", store=self.store, emit=listener)
        spend(asked.get("generator"))
        return States(plan, "encode", states, (False,) * len(states))

    @checked_call
    @keywords.in_words_of_a_call()
    def denoise(self, states: States, *, on_step: OnStep | None = None, emit: Emit | None = None) -> States:
        """The second stage: the latents, on the host, of what `encode` gave, whatever was changed in it.

        Raises InvalidInput, before anything is loaded, for states that the stage cannot work on.
        """
        return self._next("denoise", states, on_step, emit)

    @checked_call
    @keywords.in_words_of_a_call()
    def decode(self, states: States, *, emit: Emit | None = None) -> Result:
        """The last stage: the pictures of what `denoise` gave, whatever was changed in it.

        They say how they were made unless something was changed: then that could not be made again.
        """
        made = self._next("decode", states, None, emit)
        return Result(made.plan.requests, partial(_images, made))

    @contextmanager
    def _heard(self, job: Job, on_step: OnStep | None, emit: Emit | None) -> Iterator[StepListener]:
        """What hears of a run inside of the block."""
        emit = silent if emit is None else emit
        fields_of.function("emit", emit, "kind, data")
        with shown(self._progress) as told:
            yield StepListener(on_step, job.requests, tee(told, emit), warns=told is silent)

    def _next(self, stage: str, states: Any, on_step: OnStep | None, emit: Emit | None) -> States:
        before = STAGES[STAGES.index(stage) - 1]
        if not isinstance(states, States) or states.stage != before:
            what = f"states after {states.stage}" if isinstance(states, States) else f"{kind_of(states)}"
            raise InvalidInput(f"{stage} works on what pipe.{before} gives, not on {what}")
        plan = self._plan_of(states)
        keys = artifact_keys(plan)[before]
        edited = tuple(was or (kept := self.store.get(key)) is None or not same(dict(state.values), dict(kept.values))
                       for was, key, state in zip(states.edited, keys, states, strict=True))
        with self._heard(plan.job, on_step, emit) as listener:
            made = run_stage(plan, stage, store=self.store, emit=listener, states=[*states] if any(edited) else None,
                             stop=lambda: listener.stopping)
        return States(plan, stage, made, edited)


    def _plan_of(self, states: States) -> Plan:
        """The plan of the states; another one for those of a pipeline that is not like this one."""
        if states.plan.family.name != self.family.name:
            raise InvalidInput(f"these are states of {states.plan.family.name}, and this pipeline is one of "
                               f"{self.family.name} -> give them to a pipeline of {states.plan.family.name}")
        here = replace(self._job, requests=states.plan.requests)
        return states.plan if _without_digests(here) == _without_digests(states.plan.job) else make_plan(here)


_KEYWORDS = [name for name in Pipeline.__init__.__annotations__ if name not in ("family_or_model", "more", "return")]


def _without_digests(job: Job) -> Job:
    """The job as it was asked for: a plan says of which bytes a LoRA is."""
    return replace(job, loras=tuple(replace(lora, digest=None) for lora in job.loras))


def _images(made: States) -> list[Image]:
    def card(request: FilledRequest) -> dict[str, Any]:
        return card_of(request, facts_of(made.plan, (), made.plan.tile_of(request)))

    return [image_of(state.tensors()["pixels"].numpy(), None if edited else card(request))
            for state, edited, request in zip(made, made.edited, made.plan.requests, strict=True)]
