"""From the options of a command line to a job, checked as a whole before anything heavy is imported."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runner.commands import option_values
from runner.commands.batch import Batch, Defaults, Item, batch
from runner.commands.look_ahead import check_here
from runner.commands.options import FamilyOptions, ResumeOptions, RunOptions
from runner.commands.prompts import Entry, read_prompts
from runner.inputs import EXAMPLE, INPUTS, read_whole
from runner.job import STAGES, Job, Label, Origin, Output, RefusedLine, RunPolicy
from runner.job_defaults import default_store as user_store
from runner.job_defaults import new_run
from runner.job_fields import tile
from runner.media.image import PictureCard, read_card
from runner.media.paths import Naming, Unnamed
from runner.placement_options import PlaceRequest
from runner.request import COUNT, FilledRequest
from runner.text import shown
from stages.errors import InvalidInput
from stages.families import FAMILIES, Family
from stages.models.lora import NONE


def job_of(family: str, options: FamilyOptions, *, named: bool = True) -> Job:
    """The job that the options ask for, its pictures `named` or not; InvalidInput for the first thing that cannot be.
    """
    _check_together(options)
    card = read_card(options.like) if options.like is not None else None
    model = options.model if options.model is not None or card is None else _model_of(card)
    if model == "":
        raise InvalidInput("--model is empty -> name a hub id, a folder or demo")
    chosen = FAMILIES["demo" if model == "demo" else family]
    if card is not None and card.family != chosen.name:
        raise InvalidInput(f"{options.like} was made by {card.family} -> "
                           f"python -m runner {card.family} --like {shlex.quote(str(options.like))}")
    found = batch(_entries(options, card), chosen, _defaults(options, chosen, None if card is None else card.request))
    run = new_run()
    naming = Naming(options.out, run=run, total=found.total, overwrite=options.overwrite)
    items, paths, refused = _named(found, options, naming if named and not options.stop_after else None)
    return check_here(placed(Job(
        family=family,
        requests=tuple(item.request for item in items),
        model=model,
        revision=card.revision if card is not None and options.revision is options.model is None else options.revision,
        loras=option_values.loras(options.lora or (), () if card is None else card.loras),
        scheduler=option_values.scheduler(options.scheduler, None if card is None else card.scheduler),
        dtype=option_values.dtypes(options.dtype or ()) or ({} if card is None else dict(card.dtype)),
        tile=None if card is None else _tile_of(card, [item.request for item in items]),
        store=options.artifacts or str(user_store()),
        run=run,
        policy=RunPolicy(stop_after=options.stop_after, from_stage=options.from_stage, degrade=not options.no_degrade),
        output=Output(tuple(paths), options.overwrite, not options.no_metadata, str(naming.folder)),
        labels=tuple(Label(item.line, item.id) for item in items),
        refused=tuple(refused),
        origin=None if card is None or options.model is not None else Origin(
            "the picture", card.identity, "name a model with --model to repeat it with other pixels"),
    ), options))


def resumed(job: Job, options: ResumeOptions) -> Job:
    """The job of a run from before, with what the options change of it."""
    last = job.policy.stop_after or STAGES[-1]
    if options.from_stage and STAGES.index(options.from_stage) > STAGES.index(last):
        raise InvalidInput(f"--from {options.from_stage} comes after {last}, where run {job.run} stops -> leave it "
                           f"out")
    policy = replace(job.policy, from_stage=options.from_stage, degrade=job.policy.degrade and not options.no_degrade)
    output = replace(job.output, overwrite=job.output.overwrite or options.overwrite)
    return check_here(placed(replace(job, policy=policy, output=output), options))


def placed(job: Job, options: RunOptions) -> Job:
    """The job with what the options say of how it runs; what they do not say stays as it is."""
    policy = replace(
        job.policy,
        step_every=(job.policy.step_every if options.step_every is None else
                    option_values.seconds("step-every", options.step_every)),
        preview=job.policy.preview if options.preview is None else option_values.preview(options.preview),
        sample_memory=job.policy.sample_memory or options.sample_memory,
        strict=job.policy.strict or options.strict,
    )
    asked = tuple(map(PlaceRequest.read, options.place or ()))
    # What is said of a stage stands in for all that was said of it.
    before = tuple(place for place in job.place if place.stage not in {each.stage for each in asked})
    return replace(
        job, policy=policy, place=(*before, *asked),
        devices=_devices(options, job.devices),
        max_memory=option_values.limits(options.max_memory, job.max_memory),
        allow_offload=None if options.allow_offload == "none" else options.allow_offload or job.allow_offload,
        lanes=job.lanes if options.lanes is None else option_values.lanes(options.lanes),
        tile=job.tile if options.tile is None else tile(options.tile),
        whole=job.whole if options.tile is None else 0,
        modulation_table=job.modulation_table and not options.no_modulation_table,
        peer_copies=job.peer_copies and not options.no_p2p,
    )


def _devices(options: RunOptions, before: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that are asked for, those from `before` where none are."""
    if options.device is None and options.gpus is None:
        return before
    return option_values.devices(options.device or (), options.gpus)


def check_display(options: RunOptions) -> None:
    """Raise InvalidInput for options about what is said that contradict each other."""
    if options.quiet and options.verbose:
        raise InvalidInput("--quiet and --verbose contradict each other -> leave one of them out")


def check_engine(options: RunOptions, launched: bool) -> None:
    """Raise InvalidInput for options that contradict --engine ray; whether a launcher started this process."""
    if options.engine != "ray":
        return
    if launched:
        raise InvalidInput("--engine ray starts processes of its own, and a launcher started this one -> leave one "
                           "out")
    for option, none in (("ranks", NONE), ("gpus", option_values.ALL)):
        if getattr(options, option) not in (None, none):
            raise InvalidInput(f"--{option} has no meaning with --engine ray, which deals out cards and pictures "
                               f"itself -> leave one of them out")
    if any("tensor_parallel" in text for text in options.place or ()):
        raise InvalidInput("--engine ray and denoise=tensor_parallel contradict each other -> leave one of them out")
    if options.artifacts == "memory":
        raise InvalidInput("--engine ray needs a store that all its workers share -> --artifacts DIR or URL")


def _model_of(card: PictureCard) -> str:
    """The model of a picture, as --model takes it: the demo checkpoint lies elsewhere on another machine."""
    return "demo" if card.family == "demo" else card.model


def _tile_of(card: PictureCard, requests: Sequence[FilledRequest]) -> int | None:
    """The tiles of a picture that is made once more; pictures of another size have none to keep to."""
    sizes = {(request.width, request.height) for request in requests}
    return card.tile if sizes == {(card.request.width, card.request.height)} else None


def _entries(options: FamilyOptions, card: PictureCard | None) -> list[Entry]:
    if options.prompt_file is not None:
        if options.prompt is not None:
            raise InvalidInput("--prompt and --prompt-file both say what to draw -> leave one of them out")
        return read_prompts(options.prompt_file)
    if options.prompt is None and card is None:
        raise InvalidInput(f'there is no prompt -> such as "{EXAMPLE}", or --prompt-file FILE to read some')
    prompt = card.request.prompt if card is not None and options.prompt is None else str(options.prompt)
    return [Entry(0, {"prompt": prompt})]


def _defaults(options: FamilyOptions, family: Family, before: FilledRequest | None) -> Defaults:
    inputs: dict[str, Any] = {}
    if before is not None:
        inputs = {name: getattr(before, name) for name in ("steps", "guidance", "text_tokens", "negative_prompt")}
        inputs["size"] = before.width, before.height
    if (size := option_values.size(options.size, options.width, options.height, inputs.get("size", family.size))):
        inputs["size"] = size
    for name in ("steps", "guidance", "negative_prompt"):
        if (text := getattr(options, name)) is not None:
            inputs[name] = INPUTS[name].read(text)
    seeds = option_values.seeds(options.seed) if options.seed else (-1 if before is None else before.seed,)
    if len(seeds) > 1 and options.count is not None:
        raise InvalidInput("--count and several seeds contradict each other -> leave one of them out")
    return Defaults(inputs, seeds, 1 if options.count is None else read_whole("count", options.count, 1, COUNT))


def _named(
    found: Batch, options: FamilyOptions, naming: Naming | None
) -> tuple[list[Item], list[str], list[RefusedLine]]:
    """The items that have a name, their paths, and the lines refused so far; InvalidInput where no item is left."""
    items, paths, refused = list[Item](), list[str](), list(found.refused)
    for item in found.items:
        try:
            paths += [] if naming is None else [str(naming.path(item.request, item.id, item.out))]
            items.append(item)
        except Unnamed as error:
            if not item.line:
                raise
            refused.append(RefusedLine(item.line, error.text))
    refused.sort(key=lambda line: line.line)
    if not items:
        more = f"; so {'is' if len(refused) == 2 else 'are'} {len(refused) - 1:,} more" if len(refused) > 1 else ""
        raise InvalidInput(f"--prompt-file {shown(str(options.prompt_file))} has no good line: {refused[0]}{more}")
    return items, paths, refused


def _check_together(options: FamilyOptions) -> None:
    check_display(options)
    if options.stop_after and options.out is not None:
        raise InvalidInput(f"--stop-after {options.stop_after} makes no picture -> leave --out out")
    if options.from_stage in STAGES[1:] and options.artifacts == "memory":
        raise InvalidInput(f"--from-stage {options.from_stage} needs artifacts of a run before -> --artifacts DIR")


