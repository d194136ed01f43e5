"""The command line: options in, paths of pictures out; nothing heavy is imported before all of it is checked."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from types import FrameType
from typing import Annotated, Literal

import typer

from runner.commands import housekeeping
from runner.commands.refusal import failed, refuse, usage
from runner.commands.resuming import Resume
from runner.engine.signals import Interrupted
from stages.families import FAMILIES, Family

app = typer.Typer(
    name="runner",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pictures with diffusion models that are larger than your cards, stage by stage.",
)


@dataclass(frozen=True)
class Options:
    """The options of every family; calling them makes the pictures."""

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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Say nothing in the picture file.")] = False
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="[COMPONENT=]TYPE", help="float32, bfloat16, float16; repeatable.")
    ] = None
    device: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Such as cuda:0, cpu; repeatable.")] = None
    no_modulation_table: Annotated[
        bool, typer.Option("--no-modulation-table", help="Load what could be computed ahead, too.")
    ] = False
    lanes: Annotated[
        str | None, typer.Option(metavar="N", help="Pictures denoised at once, over several cards.")
    ] = None
    step_every: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="Keep unfinished denoises this often; 10 unless said.")
    ] = None
    no_degrade: Annotated[
        bool, typer.Option("--no-degrade", help="End at once when a stage runs out of memory; change nothing.")
    ] = False
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="Cards to use, in this order.")] = None
    no_p2p: Annotated[bool, typer.Option("--no-p2p", help="Copy from card to card through host memory.")] = False
    max_memory: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="14GiB, 80%, -2GiB (leave free), or 0=14GiB,1=12GiB.")
    ] = None
    place: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE=WHERE", help="denoise=sharded, encode.text_encoder_2=1, denoise=0:9,1:28,0:20."),
    ] = None
    allow_offload: Annotated[
        Literal["cpu", "disk"] | None,
        typer.Option(help="Let blocks that fit no card wait in host memory; disk: and on the disk, if they must."),
    ] = None
    artifacts: Annotated[str | None, typer.Option(metavar="DIR|URL|memory", help="Where stages keep results.")] = None
    stop_after: Annotated[Literal["encode", "denoise"] | None, typer.Option(help="End the run there.")] = None
    from_stage: Annotated[
        Literal["encode", "denoise", "decode"] | None, typer.Option(help="Compute anew from there on.")
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Refuse damaged artifacts instead of redoing them.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of paths.")] = False
    log: Annotated[str | None, typer.Option(metavar="FILE", help="Append every event to FILE as a JSON line.")] = None
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who runs the stages: this process, or workers of a Ray cluster.")
    ] = "local"
    ranks: Annotated[str | None, typer.Option(metavar="N", help="Processes that share the pictures and cards.")] = None
    rank_timeout: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="How long a rank may do nothing; 120 unless said.")
    ] = None
    preview: Annotated[str | None, typer.Option(metavar="N", help="Show a rough picture every N steps.")] = None
    sample_memory: Annotated[
        bool, typer.Option("--sample-memory", help="Record memory ten times a second, for the report.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but errors.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, library warnings included.")] = False

    def __call__(self) -> int:
        from runner.commands.make import make

        return make(str(self.ctx.info_name), self)


@dataclass(frozen=True)
class BatchOptions(Options):
    """The options of a family, which is named, or flux."""

    family: Annotated[str, typer.Argument(metavar="[FAMILY]", help="flux unless said.")] = "flux"

    def __call__(self) -> int:
        from runner.commands.make import make

        return make(self.family, Options(**{option.name: getattr(self, option.name) for option in fields(Options)}))


@dataclass(frozen=True)
class PlanOptions(Options):
    """The options of a family, for a plan that is printed and not run."""

    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Such as flux.")] = field(kw_only=True)
    machine: Annotated[
        str | None, typer.Option(metavar="CARDS", help="Cards that need not be here: 2x16GB, 16GB+8GB.")
    ] = None

    def __call__(self) -> int:
        from runner.commands.make import foresee

        foresee(self.family, self)
        return 0


def _about(family: Family) -> str:
    size = "{}x{}".format(*family.size)
    guidance = "no guidance" if family.guidance is None else f"guidance {family.guidance:g}"
    model = "the small model that comes with it" if family.repo == "demo" else family.repo
    return f"Make pictures with {model}: {size}, {family.steps} steps, {guidance}."


for _family in FAMILIES.values():
    app.command(_family.name, help=_about(_family))(Options)


app.command("plan", help="Show where everything would go, and whether it fits; nothing is loaded.")(PlanOptions)

app.command("batch", help="Make the pictures of --prompt-file: as the family's own command does.")(BatchOptions)

app.command("resume", help="Go on with a run that was interrupted or failed, or finish it once more.")(Resume)


@app.command()
def inspect(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A key, or a path or URL inside the store.")],
    artifacts: Annotated[str | None, typer.Option(metavar="DIR|URL", help="The store.")] = None,
) -> Callable[[], None]:
    """Show what an artifact holds: names, shapes, types, ranges and non-finite values."""
    from runner.commands.inspect import look

    return partial(look, artifact, artifacts)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN|last", help="The name of a run in the store.")],
    out: Annotated[str | None, typer.Option(metavar="FILE.html", help="Where to; RUN.html if not said.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    artifacts: Annotated[str | None, typer.Option(metavar="DIR", help="The store.")] = None,
) -> Callable[[], None]:
    """Write what a run did as one HTML page: pictures, where every block lay, memory and time."""
    from runner.commands.report import publish

    return partial(publish, run, out, artifacts, overwrite=overwrite)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="Cards to look at.")] = None,
) -> Callable[[], None]:
    """Try this machine: every card and pair of cards, memory, disk, cache and token."""
    from runner.commands.make import diagnose

    return partial(diagnose, as_json=json, gpus=gpus)


app.add_typer(housekeeping.app, name="runs")


def main() -> int:
    """Answer the command line of this process; the exit code."""
    # Imports make 700,000 objects that stay: looking through them again and again takes a second or two. A run, which
    # lasts, turns this on again after its imports.
    gc.disable()
    # Set whatever the user has: it stops code that a model brings.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Typer's library looks for plugins in all packages that there are.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup and the like ignore a signal on purpose.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    words = sys.argv[1:]
    code = answer(words)
    # Python looks for garbage among them once more before it ends: another second.
    gc.freeze()
    if words[:1] == ["plan"]:
        leave(code)
    return code


def leave(code: int) -> None:
    """End the process at once, as mypy does: to take every module apart takes longer than to plan a stage.

    Only for a command that leaves nothing behind but what it printed; without effect where that cannot be written.
    """
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(words: Sequence[str]) -> int:
    """Answer one command line, errors in one line included; the exit code."""
    try:
        job = app(list(words) or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        return refuse(usage(error), 2)
    verbose = not {"-v", "--verbose"}.isdisjoint(words)
    return respond(job, verbose=verbose, words=words) if callable(job) else int(job)


def respond(job: Callable[[], int | None], *, verbose: bool, words: Sequence[str] = ()) -> int:
    """Do what a command line asks for, errors included; the exit code.

    What does not fit ends with what was tried, and a command made of the `words` of this one, if they are known.
    """
    try:
        return job() or 0
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        return refuse(f"{stopped}; what was finished is kept", stopped.code, error)
    except Exception as error:  # the last one to answer for the process: a line and an exit code, not a traceback
        return failed(app, error, words, verbose=verbose)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
