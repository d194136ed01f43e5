"""The options of the command line, and nothing else: nothing heavy is imported before all of them are checked."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from stages.errors import InvalidInput
from stages.families import FAMILIES

StageChoice = Literal["encode", "denoise", "decode"]
PICTURE, FILE, MODEL, RUN = "Picture", "Where it goes", "Model", "The run"
PROCESSES, SAID, PLACEMENT = "Several processes", "What is said", "Placement"


@dataclass(frozen=True)
class Invocation:
    """How a command was called."""

    ctx: typer.Context


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about what it is asked for, and what it says meanwhile."""

    artifacts: Annotated[
        str | None, typer.Option(metavar="DIR|URL|memory", help="The store, where stages keep their results.",
                                 show_default="in the user's cache", rich_help_panel=RUN)
    ] = None
    step_every: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="Keep unfinished denoises this often.", show_default="10",
                                 rich_help_panel=RUN)
    ] = None
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse damaged artifacts instead of redoing them.", rich_help_panel=RUN)
    ] = False
    no_degrade: Annotated[
        bool, typer.Option("--no-degrade", help="End at once when a stage runs out of memory; change nothing.",
                           rich_help_panel=RUN)
    ] = False
    engine: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(help="Who runs the stages: this process and its ranks, or a Ray cluster.", show_default="local",
                     rich_help_panel=PROCESSES),
    ] = None
    ranks: Annotated[
        str | None, typer.Option(metavar="N", help="Processes that share the pictures and cards.",
                                 show_default="none", rich_help_panel=PROCESSES)
    ] = None
    rank_timeout: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="How long a rank may do nothing.", show_default="120",
                                 rich_help_panel=PROCESSES)
    ] = None
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of paths and tables.", rich_help_panel=SAID)
    ] = False
    preview: Annotated[
        str | None, typer.Option(metavar="N", help="Show a rough picture every N steps.", show_default="none",
                                 rich_help_panel=SAID)
    ] = None
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Append every event to FILE as a JSON line.",
                                 show_default="none",
                                 rich_help_panel=SAID)
    ] = None
    sample_memory: Annotated[
        bool, typer.Option("--sample-memory", help="Record memory ten times a second, for the report.",
                           rich_help_panel=SAID)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing but errors.", rich_help_panel=SAID)
    ] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Everything: the arithmetic, seconds by stage, warnings of "
                                                   "libraries.", rich_help_panel=SAID)
    ] = False
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print each setting and where it came from; run nothing.",
                           rich_help_panel=SAID)
    ] = False
    gpus: Annotated[
        str | None, typer.Option(metavar="0,1", help="Cards to use, in this order.", show_default="all",
                                 rich_help_panel=PLACEMENT)
    ] = None
    device: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Such as cuda:0, cpu; repeatable.",
                                       show_default="all cards, or the CPU",
                                       rich_help_panel=PLACEMENT)
    ] = None
    max_memory: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="14GiB, 80%, -2GiB (leave free), 0=14GiB,1=12GiB, or none.",
                                 show_default="none", rich_help_panel=PLACEMENT)
    ] = None
    place: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE=WHERE",
                     help="denoise=sharded, encode.text_encoder_2=1, denoise=0:9,1:28,0:20 (blocks), decode=auto.",
                     show_default="auto", rich_help_panel=PLACEMENT),
    ] = None
    tile: Annotated[
        str | None, typer.Option(metavar="auto|0|N", help="Decode in tiles of N pixels; 0: whole.",
                                 show_default="auto: what does not fit whole", rich_help_panel=PLACEMENT)
    ] = None
    allow_offload: Annotated[
        Literal["cpu", "disk", "none"] | None,
        typer.Option(help="Let blocks that fit no card wait in host memory; disk: and on the disk, if they must.",
                     show_default="none", rich_help_panel=PLACEMENT),
    ] = None
    lanes: Annotated[
        str | None, typer.Option(metavar="N", help="Pictures denoised at once, over several cards.",
                                 show_default="as many as keep the cards busy", rich_help_panel=PLACEMENT)
    ] = None
    no_modulation_table: Annotated[
        bool, typer.Option("--no-modulation-table", help="Load what could be computed ahead, too.",
                           rich_help_panel=PLACEMENT)
    ] = False
    no_p2p: Annotated[
        bool, typer.Option("--no-p2p", help="Copy from card to card through host memory.", rich_help_panel=PLACEMENT)
    ] = False


@dataclass(frozen=True)
class PictureOptions:
    """What is asked for."""

    words: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.", hidden=True)
    ] = None
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to draw; it may also stand alone, "
                                       "in quotes. - reads standard input.", rich_help_panel=PICTURE)
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What guidance leads away from; for qwen-image and sd3.",
                                 show_default="none",
                                 rich_help_panel=PICTURE)
    ] = None
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="Prompts: .txt, one a line, or .jsonl, an object a line.",
                                 rich_help_panel=PICTURE)
    ] = None
    like: Annotated[
        str | None, typer.Option(metavar="PICTURE", help="Repeat a picture; options change it.",
                                 rich_help_panel=PICTURE)
    ] = None
    seed: Annotated[
        list[str] | None, typer.Option("--seed", "-s", metavar="N,N", help="Seed of the first picture, or of each.",
                                       show_default="-1: random", rich_help_panel=PICTURE)
    ] = None
    count: Annotated[
        str | None, typer.Option("--count", "-n", metavar="N", help="Pictures of a prompt, 1 to 64.",
                                 show_default="1", rich_help_panel=PICTURE)
    ] = None
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size in pixels; 512 is 512x512.",
                                 show_default="the model's", rich_help_panel=PICTURE)
    ] = None
    width: Annotated[
        str | None, typer.Option("--width", "-W", metavar="N", help="The width alone, in pixels.",
                                 show_default="the size's", rich_help_panel=PICTURE)
    ] = None
    height: Annotated[
        str | None, typer.Option("--height", "-H", metavar="N", help="The height alone, in pixels.",
                                 show_default="the size's", rich_help_panel=PICTURE)
    ] = None
    steps: Annotated[
        str | None, typer.Option(metavar="N", help="Denoise steps, 1 to 1000.", show_default="the model's",
                                 rich_help_panel=PICTURE)
    ] = None
    guidance: Annotated[
        str | None, typer.Option(metavar="X", help="Guidance scale, 0 to 30.", show_default="the model's",
                                 rich_help_panel=PICTURE)
    ] = None
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="PATH", help="A .png, .webp or .jpg file, a folder/, or a template: "
                     "{index} {id} {seed} {prompt} {run}", show_default="{prompt}-{seed}.png", rich_help_panel=FILE),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace pictures that are there.", rich_help_panel=FILE)
    ] = False
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Say nothing in the picture file.", rich_help_panel=FILE)
    ] = False
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="Another checkpoint: a hub id, a folder, or demo.",
                                 show_default="the family's", rich_help_panel=MODEL)
    ] = None
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A commit, tag or branch of the model.", show_default="main",
                                 rich_help_panel=MODEL)
    ] = None
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A LoRA to merge into it, a file or a hub id, =SCALE "
                                       "behind it; repeatable.",
                                       show_default="none", rich_help_panel=MODEL)
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help="A scheduler of diffusers, with ,KEY=VALUE behind it what is "
                                 "changed of its config.", show_default="the model's", rich_help_panel=MODEL)
    ] = None
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="TYPE", help="bf16, fp16 or fp32, for all or as COMPONENT=TYPE; "
                                       "repeatable.", show_default="bf16 where the card has it",
                                       rich_help_panel=MODEL)
    ] = None
    stop_after: Annotated[
        Literal["encode", "denoise"] | None,
        typer.Option(help="End the run there.", show_default="decode", rich_help_panel=RUN)
    ] = None
    from_stage: Annotated[
        StageChoice | None, typer.Option(help="Compute anew from there on.", show_default="what is not in the store",
                                         rich_help_panel=RUN)
    ] = None

    @property
    def prompt(self) -> str | None:
        """The prompt; InvalidInput where several are said."""
        said = [*(self.words or ()), *(self.prompts or ())]
        if len(said) > 1:
            raise InvalidInput(f"{len(said)} prompts are said -> leave all but one out; a prompt of several words "
                               f"stands in quotes")
        return said[0] if said else None


# The fields of the last base come first.
@dataclass(frozen=True)
class FamilyOptions(RunOptions, PictureOptions, Invocation):
    """The options of every family."""


def families(incomplete: str) -> list[str]:
    """The names of families that begin like this."""
    return [name for name in FAMILIES if name.startswith(incomplete)]


@dataclass(frozen=True)
class SomeFamily(Invocation):
    """A family that is named."""

    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Such as flux.", autocompletion=families)]


@dataclass(frozen=True)
class FluxOrFamily(Invocation):
    """A family that is named, or flux."""

    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Such as flux-schnell.", autocompletion=families)
    ] = "flux"


@dataclass(frozen=True)
class BatchOptions(FamilyOptions, FluxOrFamily):
    """The options of a family, which is named, or flux."""


@dataclass(frozen=True)
class PlanOptions(FamilyOptions, SomeFamily):
    """The options of a family, for a plan that is printed and not run."""

    machine: Annotated[
        str | None, typer.Option(metavar="CARDS", help="Cards that need not be here: 2xT4, 3090+4060, 2x16GB.",
                                 show_default="this machine", rich_help_panel=PLACEMENT)
    ] = None


@dataclass(frozen=True)
class ResumedRun(Invocation):
    """A run from before."""

    run: Annotated[str, typer.Argument(metavar="RUN|last", help="The name of a run.")]


@dataclass(frozen=True)
class ResumeOptions(RunOptions, ResumedRun):
    """The options of `resume`. What is not said stays as it was."""

    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace pictures that are there.", rich_help_panel=FILE)
    ] = False
    from_stage: Annotated[
        StageChoice | None, typer.Option("--from", help="Compute anew from there on.", rich_help_panel=RUN)
    ] = None
