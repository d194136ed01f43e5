"""What a command line ends with when it fails: a line and an exit code, and commands that would do better."""

import sys
import traceback
from collections.abc import Mapping, Sequence

import typer
from typer.core import TyperGroup
from typer.main import get_command

from runner.commands.again import again
from runner.events import Tolerant
from runner.text import clean
from stages.errors import (
    BadResult,
    DoesNotFit,
    ModelError,
    RankLost,
    StageOutOfMemory,
    StagerunError,
    StoreError,
)

CODES: tuple[tuple[type[Exception], int], ...] = (
    (ModelError, 3), (DoesNotFit, 4), (MemoryError, 4), (StoreError, 5), (BadResult, 6), (RankLost, 7),
    (ValueError, 2),
)
MESSAGE = 4000


def refuse(message: str, code: int, error: BaseException | None = None, more: str = "") -> int:
    """Say in a line what is wrong, and how to go on if the error knows, and then `more`; the exit code."""
    from runner.commands.resumption import noted

    stderr = Tolerant(sys.stderr)
    stderr.write(f"error: {clean(message[: 2 * MESSAGE])}{'' if error is None else noted(error)}\n{more}")
    stderr.flush()
    return code


def failed(app: typer.Typer, error: Exception, words: Sequence[str], *, verbose: bool) -> int:
    """Say what an error was, with commands made of the `words` of this one that would do better; the exit code."""
    if verbose:
        Tolerant(sys.stderr).write("".join(traceback.format_exception(error)))
    code = next((code for kind, code in CODES if isinstance(error, kind)), 1)
    if code != 1:
        # What a plan was refused for has a line for each rung.
        text = error.said(as_option) if isinstance(error, StagerunError) else str(error)
        head, *rungs = text.splitlines() if isinstance(error, DoesNotFit) else [text]
        told = [f"  {clean(rung)}" for rung in rungs] + [f"next: {line}" for line in better(app, error, words)]
        return refuse(head, code, error, "".join(f"{line}\n" for line in told))
    hint = "" if verbose else " -> run again with -v to see where"
    return refuse(f"unexpected {type(error).__name__}: {str(error)[:MESSAGE]}{hint}", code, error)


def usage(error: typer.TyperException) -> str:
    """What is wrong with the words of a command line."""
    # Only an unknown option has possibilities, the closest first; its own message sorts them by name.
    close = vars(error).get("possibilities")
    return f"{error.message}. Did you mean {close[0]}?" if close else error.format_message()


def better(app: typer.Typer, error: Exception, words: Sequence[str]) -> list[str]:
    """The commands that would fit, or need less; those that go on with the run where they can."""
    from runner.commands.resumption import resuming
    from runner.planning.options import options_of

    if not words:
        return []
    if isinstance(error, DoesNotFit):
        return _changed(app, [words], options_of(error.fixes))
    ways = map(options_of, error.alternatives) if isinstance(error, StageOutOfMemory) else ()
    return [line for way in ways for line in _changed(app, [resuming(error), words], way)]


def _changed(app: typer.Typer, lines: Sequence[Sequence[str]], options: Mapping[str, str]) -> list[str]:
    """The first of the command lines that has these options, with their values; none where none has."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for words in lines if options else ():
        known = {name: vars(param).get("is_flag", False) for param in group.commands[words[0]].params
                 for name in param.opts} if words else {}
        if not {change.partition(" ")[0] for change in options} - known.keys():
            return [again(words, options, [name for name, flag in known.items() if flag])]
    return []


_OPTIONS = {"loras": "--lora", "devices": "--device", "store": "--artifacts", "modulation_table=False":
            "--no-modulation-table", "peer_copies=False": "--no-p2p", "degrade=False": "--no-degrade"}


def as_option(name: str, value: str | None) -> str:
    """A name of the job as the command line has it."""
    if name == "devices" and value is not None and value[0].isdigit():
        return f"--gpus {value}"
    whole = _OPTIONS.get(f"{name}={value}")
    option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
    return whole or (option if value is None else f"{option} {value}")
