"""The options of the command line, and nothing else: nothing heavy is imported before all of them are checked."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import typer

StageChoice = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about what it is asked for, and what it says meanwhile."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False
    device: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Such as cuda:0, cpu; repeatable.")] = None
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="Cards to use, in this order.")] = None
    no_p2p: Annotated[bool, typer.Option("--no-p2p", help="Copy from card to card through host memory.")] = False
    max_memory: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="14GiB, 80%, -2GiB (leave free), 0=14GiB,1=12GiB, or none.")
    ] = None
    place: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE=WHERE",
                     help="denoise=sharded, encode.text_encoder_2=1, denoise=0:9,1:28,0:20 (blocks), decode=auto."),
    ] = None
    allow_offload: Annotated[
        Literal["cpu", "disk", "none"] | None,
        typer.Option(help="Let blocks that fit no card wait in host memory; disk: and on the disk, if they must."),
    ] = None
    lanes: Annotated[
        str | None, typer.Option(metavar="N", help="Pictures denoised at once, over several cards.")
    ] = None
    no_modulation_table: Annotated[
        bool, typer.Option("--no-modulation-table", help="Load what could be computed ahead, too.")
    ] = False
    step_every: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="Keep unfinished denoises this often; 10 unless said.")
    ] = None
    no_degrade: Annotated[
        bool, typer.Option("--no-degrade", help="End at once when a stage runs out of memory; change nothing.")
    ] = False
    preview: Annotated[str | None, typer.Option(metavar="N", help="Show a rough picture every N steps.")] = None
    sample_memory: Annotated[
        bool, typer.Option("--sample-memory", help="Record memory ten times a second, for the report.")
    ] = False
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who runs the stages: this process, or workers of a Ray cluster.")
    ] = "local"
    ranks: Annotated[str | None, typer.Option(metavar="N", help="Processes that share the pictures and cards.")] = None
    rank_timeout: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="How long a rank may do nothing; 120 unless said.")
    ] = None
    artifacts: Annotated[str | None, typer.Option(metavar="DIR|URL|memory", help="Where stages keep results.")] = None
    strict: Annotated[bool, typer.Option("--strict", help="Refuse damaged artifacts instead of redoing them.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of paths.")] = False
    log: Annotated[str | None, typer.Option(metavar="FILE", help="Append every event to FILE as a JSON line.")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but errors.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, library warnings included.")] = False


@dataclass(frozen=True)
class PictureOptions:
    """What is asked for."""

    ctx: typer.Context
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to draw; - reads standard input.")] = None
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What guidance leads away from; for qwen-image and sd3.")
    ] = None
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="Prompts: .txt, one a line, or .jsonl, an object a line.")
    ] = None
    model: Annotated[str | None, typer.Option(metavar="ID|FOLDER|demo", help="Another checkpoint.")] = None
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A commit, tag or branch of the model.")] = None
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE|ID[=SCALE]", help="Merge a LoRA into the model; repeatable.")
    ] = None
    steps: Annotated[str | None, typer.Option(metavar="N", help="Denoise steps, 1 to 1000.")] = None
    guidance: Annotated[str | None, typer.Option(metavar="X", help="Guidance scale, 0 to 30.")] = None
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels.")] = None
    seed: Annotated[
        list[str] | None, typer.Option(metavar="N[,N...]", help="Seed of the first picture, -1: random; or all seeds.")
    ] = None
    count: Annotated[str | None, typer.Option(metavar="N", help="Pictures of a prompt, 1 to 64.")] = None
    like: Annotated[str | None, typer.Option(metavar="PICTURE", help="Repeat a picture; options change it.")] = None
    out: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A .png file, a folder/, or a template: {index} {id} {seed} {prompt} {run}"),
    ] = None
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Say nothing in the picture file.")] = False
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="[COMPONENT=]TYPE", help="float32, bfloat16, float16; repeatable.")
    ] = None
    stop_after: Annotated[Literal["encode", "denoise"] | None, typer.Option(help="End the run there.")] = None
    from_stage: Annotated[StageChoice | None, typer.Option(help="Compute anew from there on.")] = None


# The fields of the second base come first.
@dataclass(frozen=True)
class FamilyOptions(RunOptions, PictureOptions):
    """The options of every family."""


@dataclass(frozen=True)
class BatchOptions(FamilyOptions):
    """The options of a family, which is named, or flux."""

    family: Annotated[str, typer.Argument(metavar="[FAMILY]", help="flux unless said.")] = "flux"


@dataclass(frozen=True)
class PlanOptions(FamilyOptions):
    """The options of a family, for a plan that is printed and not run."""

    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Such as flux.")] = field(kw_only=True)
    machine: Annotated[
        str | None, typer.Option(metavar="CARDS", help="Cards that need not be here: 2xT4, 3090+4060, 2x16GB.")
    ] = None


@dataclass(frozen=True)
class ResumeOptions(RunOptions):
    """The options of `resume`. What is not said stays as it was."""

    run: Annotated[str, typer.Argument(metavar="RUN|last", help="The name of a run.")] = field(kw_only=True)
    from_stage: Annotated[StageChoice | None, typer.Option("--from", help="Compute anew from there on.")] = None
