"""The command line: options in, paths of pictures out; nothing heavy is imported before all of it is checked."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Annotated

import typer

from runner.commands import help as pages
from runner.commands import runs_options
from runner.commands.family_names import family_of, first_word
from runner.commands.options import BatchOptions, FamilyOptions, PlanOptions, ResumeOptions, RunOptions, families
from runner.commands.prompt_words import check_prompt_words
from runner.commands.refusal import failed, refuse
from runner.commands.settings import settled
from runner.commands.standard_input import may_read, read_prompt
from runner.commands.usage import usage
from runner.commands.words import spellings, with_prompt
from runner.engine.signals import Interrupted
from stages.errors import InvalidInput
from stages.families import FAMILIES

PROGRAM, OTHERS, CACHE = "stagerun", "Other commands", "in the user's cache"
app = typer.Typer(
    name="runner",
    cls=pages.Group,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pictures with diffusion models that are larger than your cards, stage by stage.",
    epilog=pages.start(),
)


def _version(asked: bool) -> None:
    if asked:
        from runner.commands.version import show_version

        show_version()
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions and cards.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """What stands before any command."""


for _family in FAMILIES.values():
    app.command(_family.name, help=pages.about(_family), cls=pages.FamilyCommand, rich_help_panel="Families",
                epilog=pages.examples(_family.name))(FamilyOptions)

app.command("plan", help="Show where everything would go, and whether it fits; nothing is loaded.",
            cls=pages.PlanCommand, rich_help_panel=OTHERS, epilog=pages.planning())(PlanOptions)
app.command("batch", help="Make the pictures of --prompt-file: as the family's own command does.",
            cls=pages.Command, rich_help_panel=OTHERS, epilog=pages.batches())(BatchOptions)
app.command("resume", help="Go on with a run that was interrupted or failed, or finish it once more.",
            cls=pages.ResumeCommand, rich_help_panel=OTHERS, epilog=pages.resuming())(ResumeOptions)


@app.command(cls=pages.Command, rich_help_panel=OTHERS)
def models(
    family: Annotated[
        str | None, typer.Argument(metavar="FAMILY", help="One alone.", autocompletion=families, show_default="all")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> Callable[[], None]:
    """List the families: their models, licenses, parameters and defaults."""
    from runner.commands.models import show_models

    return partial(show_models, None if family is None else family_of(family, ("models",)), as_json=json)


@app.command(cls=pages.Command, rich_help_panel=OTHERS)
def inspect(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="RUN:STAGE such as last:denoise, a key, or a path or URL.")],
    artifacts: Annotated[str | None, typer.Option(metavar="DIR|URL", help="The store.", show_default=CACHE)] = None,
) -> Callable[[], None]:
    """Show what an artifact holds: names, shapes, types, ranges and non-finite values."""
    from runner.commands.inspect import inspect

    return partial(inspect, artifact, artifacts)


@app.command(cls=pages.Command, rich_help_panel=OTHERS)
def report(
    run: Annotated[str, typer.Argument(metavar="RUN|last", help="The name of a run in the store.")],
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE.html", help="Where to.",
                                             show_default="RUN.html")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    artifacts: Annotated[str | None, typer.Option(metavar="DIR", help="The store.", show_default=CACHE)] = None,
) -> Callable[[], None]:
    """Write what a run did as one HTML page: pictures, where every block lay, memory and time."""
    from runner.commands.report import write_report

    return partial(write_report, run, out, artifacts, overwrite=overwrite)


@app.command(cls=pages.Command, rich_help_panel=OTHERS)
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="Cards to look at.", show_default="all")] = None,
) -> Callable[[], None]:
    """Try this machine: every card and pair of cards, memory, disk, cache and token."""
    from runner.commands.doctor import diagnose

    return partial(diagnose, as_json=json, gpus=gpus)


app.add_typer(runs_options.app, name="runs", rich_help_panel=OTHERS)


def main() -> int:
    """Answer the command line of this process; the exit code."""
    speak_utf8()
    open_streams()
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


def speak_utf8() -> None:
    """Begin this process anew in Python's UTF-8 mode where it knows of no letters but ASCII, whose prompts, paths and
    models have others all the same: of LC_ALL=C with Python's own way around it switched off, as some services do.
    """
    if sys.getfilesystemencoding() == "ascii":
        # Not by the environment alone, which `python -I` does not heed; ranks are started with it.
        words = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, words, {**os.environ, "PYTHONUTF8": "1"})


def open_streams() -> None:
    """Open standard streams that whoever started the process closed: files would get their numbers, and be written to.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest number that is free.
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  # for good


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
    as_json = False
    try:
        words = first_word(words, _commands())
        command = app(list(words) or ["--help"], standalone_mode=False, prog_name=_program(words))
        if isinstance(command, int) or command is None:
            return command or 0
        as_json = isinstance(command, RunOptions) and command.json and may_read()
        if isinstance(command, RunOptions):
            check_prompt_words(command, words, spellings(app, words), _commands())
            command, words = _read_input(command, words)
            return generate(command)
        return command() or 0
    except typer.TyperException as error:
        return refuse(usage(error, words), 2, as_json="--json" in words and may_read())
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        return refuse(f"{stopped}; what was finished is kept", stopped.code, error)
    except Exception as error:  # the last one to answer for the process: a line and an exit code, not a traceback
        return failed(app, error, words, verbose=not {"-v", "--verbose"}.isdisjoint(words), as_json=as_json,
                      plans=plans)


def plans(words: Sequence[str]) -> bool:
    """Whether a command line that is to be suggested leads to a plan."""
    from runner.commands.suggested import leads_to_a_plan

    try:
        command = app(list(words), standalone_mode=False)
        if not isinstance(command, RunOptions):
            return False
        family = _family_name(command)
        return leads_to_a_plan(settled(command, family)[0], family)
    except InvalidInput:
        return False


def generate(options: RunOptions) -> int:
    """Do what the options of a run ask for; the exit code."""
    from runner.commands import generate as commands
    from runner.distributed.env import launched

    family = _family_name(options)
    options, origins = settled(options, family, launched=launched() is not None)
    if options.print_config:
        from runner.commands.config import show_config

        show_config(options, family, origins)
        return 0
    match options:
        case ResumeOptions():
            return commands.resume(options.run, options)
        case PlanOptions():
            commands.show_plan(family, options)
            return 0
        case FamilyOptions():
            return commands.make(family, options)
    raise AssertionError(f"no command has {type(options).__name__}")


def _commands() -> list[str]:
    return [str(each.name or each.callback.__name__) for each in app.registered_commands if each.callback] + [
        str(each.name) for each in app.registered_groups]


def _family_name(options: RunOptions) -> str:
    """The family that the options are of; empty where a run from before says it."""
    match options:
        case PlanOptions():
            return family_of(options.family, ("plan",))
        case BatchOptions():
            return family_of(options.family, ("batch",))
        case FamilyOptions():
            return str(options.ctx.info_name)
    return ""


def _read_input(options: RunOptions, words: Sequence[str]) -> tuple[RunOptions, Sequence[str]]:
    """The options and the words with the prompt that was on standard input: what a suggestion repeats."""
    if not isinstance(options, FamilyOptions) or options.prompt != "-" or not may_read():
        return options, words
    prompt = read_prompt()
    return replace(options, words=None, prompts=[prompt]), with_prompt(words, prompt, spellings(app, words))


def _program(words: Sequence[str]) -> str | None:
    """What completes the words of a shell: the installed program, however this one was called."""
    return PROGRAM if {"--install-completion", "--show-completion"} & set(words[:1]) else None


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
