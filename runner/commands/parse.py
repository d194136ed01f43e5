"""From the options of a command line to a job, checked as a whole before anything heavy is imported."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from runner.commands.batch import Batch, Defaults, Item, batch
from runner.commands.options import FamilyOptions, ResumeOptions, RunOptions
from runner.commands.prompts import Entry, read_prompts
from runner.inputs import INPUTS, PROMPT_BYTES, SEED, STEPS, read_size, read_whole
from runner.job import DTYPES, LANES, STAGES, Job, Label, Origin, Output, RefusedLine, RunPolicy, new_run
from runner.job import default_store as user_store
from runner.media.image import PictureCard, read_card
from runner.media.paths import Naming, Unnamed
from runner.placement_options import MemoryLimits, PlaceRequest
from runner.request import COUNT, Request
from runner.text import shown
from stages.errors import InvalidInput
from stages.families import FAMILIES
from stages.models.lora import NONE, LoraRequest, read_loras

DAY = 24 * 3600


def job_of(family: str, said: FamilyOptions) -> Job:
    """The job that the options ask for; InvalidInput for the first thing that cannot be."""
    check_family(family)
    _check_together(said)
    card = read_card(said.like) if said.like is not None else None
    model = said.model if said.model is not None or card is None else _model_of(card)
    if model == "":
        raise InvalidInput("--model is empty -> name a hub id, a folder or demo")
    chosen = FAMILIES["demo" if model == "demo" else family]
    if card is not None and card.family != chosen.name:
        raise InvalidInput(f"{said.like} was made by {card.family} -> runner {card.family} --like {said.like}")
    found = batch(_entries(said, card), chosen, _defaults(said, None if card is None else card.request))
    run = new_run()
    items, paths, refused = _named(found, said, run)
    return placed(Job(
        family=family,
        requests=tuple(item.request for item in items),
        model=model,
        revision=card.revision if card is not None and said.revision is said.model is None else said.revision,
        loras=_loras(said.lora or (), () if card is None else card.loras),
        dtype=_dtypes(said.dtype or ()) or ({} if card is None else dict(card.dtype)),
        store=said.artifacts or str(user_store()),
        run=run,
        policy=RunPolicy(stop_after=said.stop_after, from_stage=said.from_stage, degrade=not said.no_degrade),
        output=Output(tuple(paths), said.overwrite, not said.no_metadata),
        labels=tuple(Label(item.line, item.id) for item in items),
        refused=tuple(refused),
        origin=None if card is None or said.model is not None else Origin(
            "the picture", card.identity, "name a model with --model to repeat it with other pixels"),
    ), said)


def resumed(job: Job, said: ResumeOptions) -> Job:
    """The job of a run from before, with what the options change of it."""
    last = job.policy.stop_after or STAGES[-1]
    if said.from_stage and STAGES.index(said.from_stage) > STAGES.index(last):
        raise InvalidInput(f"--from {said.from_stage} comes after {last}, where run {job.run} stops -> leave it out")
    policy = replace(job.policy, from_stage=said.from_stage, degrade=job.policy.degrade and not said.no_degrade)
    output = replace(job.output, overwrite=job.output.overwrite or said.overwrite)
    return placed(replace(job, policy=policy, output=output), said)


def placed(job: Job, said: RunOptions) -> Job:
    """The job with what the options say of how it runs; what they do not say stays as it is."""
    policy = replace(
        job.policy,
        step_every=job.policy.step_every if said.step_every is None else float(
            read_whole("step-every", said.step_every, 0, DAY)),
        preview=job.policy.preview if said.preview is None else read_whole("preview", said.preview, 1, STEPS),
        sample_memory=job.policy.sample_memory or said.sample_memory,
        strict=job.policy.strict or said.strict,
    )
    place = tuple(map(PlaceRequest.read, said.place)) if said.place else job.place
    return replace(
        job, policy=policy, place=place,
        devices=devices(said.device or (), said.gpus) or job.devices,
        max_memory=job.max_memory if said.max_memory is None else MemoryLimits.read(said.max_memory),
        allow_offload=said.allow_offload or job.allow_offload,
        lanes=job.lanes if said.lanes is None else read_whole("lanes", said.lanes, 1, LANES),
        modulation_table=job.modulation_table and not said.no_modulation_table,
        peer_copies=job.peer_copies and not said.no_p2p,
    )


def check_family(family: str) -> None:
    """Raise InvalidInput for a family that there is not."""
    if family not in FAMILIES:
        close = get_close_matches(family, FAMILIES, 1)
        raise InvalidInput(f"there is no family {shown(family)} -> choose from {', '.join(close or FAMILIES)}")


def check_display(said: RunOptions) -> None:
    """Raise InvalidInput for options about what is said that contradict each other."""
    if said.quiet and said.verbose:
        raise InvalidInput("--quiet and --verbose contradict each other -> leave one of them out")


def check_engine(said: RunOptions, launched: bool) -> None:
    """Raise InvalidInput for options that contradict --engine ray; whether a launcher started this process."""
    if said.engine != "ray":
        return
    if launched:
        raise InvalidInput("--engine ray starts processes of its own, and a launcher started this one -> leave one "
                           "out")
    for option in ("ranks", "gpus"):
        if getattr(said, option) is not None:
            raise InvalidInput(f"--{option} has no meaning with --engine ray, which deals out cards and pictures "
                               f"itself -> leave one of them out")
    if any("tensor_parallel" in text for text in said.place or ()):
        raise InvalidInput("--engine ray and denoise=tensor_parallel contradict each other -> leave one of them out")
    if said.artifacts == "memory":
        raise InvalidInput("--engine ray needs a store that all its workers share -> --artifacts DIR or URL")


def devices(names: Sequence[str], gpus: str | None) -> tuple[str, ...]:
    """The devices that --device or --gpus choose, none for all there are; InvalidInput for both and for nonsense."""
    if gpus is None:
        for name in names:
            if not re.fullmatch("[a-z]{1,16}(:[0-9]{1,3})?", name):
                raise InvalidInput(f"--device {shown(name)} is no device -> such as cpu, cuda:0")
        return tuple(names)
    if names:
        raise InvalidInput("--gpus and --device both choose devices -> leave one of them out")
    if not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3})*", gpus):
        raise InvalidInput(f"--gpus {shown(gpus)}: write the numbers of cards, such as 0,1")
    return tuple(gpus.split(","))


def read_seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """The seeds that --seed lists, such as 7 or 1,2,3; InvalidInput for -1, which draws one, among several."""
    listed = [text for each in texts for text in each.split(",")]
    seeds = tuple(read_whole("seed", text, -1 if len(listed) == 1 else 0, SEED) for text in listed[: COUNT + 1])
    if len(seeds) > COUNT:
        raise InvalidInput(f"--seed lists {len(listed):,} seeds; the limit is {COUNT}")
    return seeds


def _model_of(card: PictureCard) -> str:
    """The model of a picture, as --model takes it: the demo checkpoint lies elsewhere on another machine."""
    return "demo" if card.family == "demo" else card.model


def _dtypes(texts: Sequence[str]) -> dict[str, str]:
    """Types by component from `bfloat16` (all, under "") and `vae=float32`; InvalidInput for another or two."""
    found: dict[str, str] = {}
    for text in texts:
        component, _, dtype = text.rpartition("=")
        if dtype not in DTYPES:
            raise InvalidInput(f"--dtype {shown(text)}: choose one of {', '.join(DTYPES)}, or COMPONENT=TYPE")
        if component in found:
            raise InvalidInput(f"--dtype is said twice for {shown(component) if component else 'all components'}")
        found[component] = dtype
    return found


def _loras(texts: Sequence[str], before: tuple[LoraRequest, ...]) -> tuple[LoraRequest, ...]:
    """The LoRAs that are asked for: those of a picture `before` unless some are named, or `none`."""
    if NONE in texts:
        if len(texts) > 1:
            raise InvalidInput(f"--lora {NONE} and other LoRAs contradict each other -> leave one of them out")
        return ()
    return read_loras(texts) or before


def _entries(said: FamilyOptions, card: PictureCard | None) -> list[Entry]:
    if said.prompt_file is not None:
        if said.prompt is not None:
            raise InvalidInput("--prompt and --prompt-file both say what to draw -> leave one of them out")
        return read_prompts(said.prompt_file)
    if said.prompt is None and card is None:
        raise InvalidInput('there is no prompt -> --prompt "a red circle", --prompt - or --prompt-file FILE to read '
                           'it')
    prompt = card.request.prompt if card is not None and said.prompt is None else _prompt(str(said.prompt))
    return [Entry(0, {"prompt": prompt})]


def _defaults(said: FamilyOptions, before: Request | None) -> Defaults:
    options: dict[str, Any] = {}
    if before is not None:
        options = {name: getattr(before, name) for name in ("steps", "guidance", "text_tokens", "negative_prompt")}
        options["size"] = before.width, before.height
    if said.size is not None:
        options["size"] = read_size(said.size)
    for name in ("steps", "guidance", "negative_prompt"):
        if (text := getattr(said, name)) is not None:
            options[name] = INPUTS[name].read(text)
    seeds = read_seeds(said.seed) if said.seed else (-1 if before is None else before.seed,)
    if len(seeds) > 1 and said.count is not None:
        raise InvalidInput("--count and several seeds contradict each other -> leave one of them out")
    return Defaults(options, seeds, 1 if said.count is None else read_whole("count", said.count, 1, COUNT))


def _named(found: Batch, said: FamilyOptions, run: str) -> tuple[list[Item], list[str], list[RefusedLine]]:
    """The items that have a name, their paths, and the lines refused so far; InvalidInput where no item is left."""
    naming = Naming(said.out, run=run, total=found.total, overwrite=said.overwrite)
    items, paths, refused = list[Item](), list[str](), list(found.refused)
    for item in found.items:
        try:
            paths += [] if said.stop_after else [str(naming.path(item.request, item.id, item.out))]
            items.append(item)
        except Unnamed as error:
            if not item.line:
                raise
            refused.append(RefusedLine(item.line, error.text))
    refused.sort(key=lambda line: line.line)
    if not items:
        more = f"; so are {len(refused) - 1:,} more" if len(refused) > 1 else ""
        raise InvalidInput(f"--prompt-file {shown(str(said.prompt_file))} has no good line: {refused[0]}{more}")
    return items, paths, refused


def _prompt(text: str) -> str:
    """The prompt, from standard input where it is `-`, then without the line end behind it."""
    if text != "-":
        return text
    data = sys.stdin.buffer.read(PROMPT_BYTES + 3)
    if len(data.rstrip(b"\r\n")) > PROMPT_BYTES:
        raise InvalidInput(f"the prompt has more than {PROMPT_BYTES:,} bytes -> shorten it")
    try:
        return data.decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the prompt is not valid UTF-8 at byte {error.start} -> write it again in UTF-8"
                           ) from None


def _check_together(said: FamilyOptions) -> None:
    check_display(said)
    last = said.stop_after or STAGES[-1]
    if said.stop_after and said.out is not None:
        raise InvalidInput(f"--stop-after {last} makes no picture -> leave --out out")
    if said.from_stage and STAGES.index(said.from_stage) > STAGES.index(last):
        raise InvalidInput(f"--from-stage {said.from_stage} comes after --stop-after {last} -> leave one of them out")
    if said.from_stage in STAGES[1:] and said.artifacts == "memory":
        raise InvalidInput(f"--from-stage {said.from_stage} needs artifacts of a run before -> --artifacts DIR")


