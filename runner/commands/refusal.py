"""What a command line ends with when it fails: a line and an exit code, and commands that would do better."""

import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import typer
from typer.core import TyperGroup
from typer.main import get_command

from runner.events import Emit
from runner.job import RefusedLine
from runner.reports.repeat import resume_line
from runner.terminal import TolerantStream, say
from runner.text import clean, quoted
from stages.errors import (
    BadResult,
    DoesNotFit,
    Fixes,
    InvalidInput,
    ModelError,
    RankLost,
    StageOutOfMemory,
    StagerunError,
    StoreError,
    worded,
)

CODES: tuple[tuple[type[Exception], int], ...] = (
    (ModelError, 3), (DoesNotFit, 4), (MemoryError, 4), (StoreError, 5), (BadResult, 6), (RankLost, 7),
    (InvalidInput, 2),
)
MESSAGE = 4000
TOLD = 20
RESUME = "; go on with: "
# What the command line calls differently than a job does.
_OPTIONS = {"loras": "--lora", "devices": "--device", "store": "--artifacts", "output": "--out",
            "modulation_table=False": "--no-modulation-table", "peer_copies=False": "--no-p2p",
            "degrade=False": "--no-degrade", "download=True": "no plan command"}


def refuse(message: str, code: int, error: BaseException | None = None, more: str = "") -> int:
    """Say in a line what is wrong, and how to go on if the error knows, and then `more`; the exit code."""
    stderr = TolerantStream(sys.stderr)
    stderr.write(f"error: {clean(message[: 2 * MESSAGE])}{'' if error is None else resume_note(error)}\n{more}")
    stderr.flush()
    return code


def failed(
    app: typer.Typer, error: Exception, words: Sequence[str], *, verbose: bool,
    plans: Callable[[Sequence[str]], bool] = lambda words: True,
) -> int:
    """Say what an error was, with commands made of the `words` of this one that would do better; the exit code.

    Of the commands those are said that can be pasted, and that `plans` finds to fit.
    """
    if verbose:
        TolerantStream(sys.stderr).write("".join(traceback.format_exception(error)))
    code = next((code for kind, code in CODES if isinstance(error, kind)), 1)
    if code != 1:
        text = error.message(as_option) if isinstance(error, StagerunError) else str(error) or "out of host memory"
        # What a plan was refused for has a line for each strategy.
        head, *lines = text.splitlines() if isinstance(error, DoesNotFit) else [text]
        said = [] if reads_input(words) else [line for line in better(app, error, words) if plans(line_words(line))]
        lines = [f"  {clean(line)}" for line in lines] + [f"next: {line}" for line in said]
        return refuse(head, code, error, "".join(f"{line}\n" for line in lines))
    hint = "" if verbose else " -> run again with -v to see where"
    return refuse(f"unexpected {type(error).__name__}: {str(error)[:MESSAGE]}{hint}", code, error)


def usage(error: typer.TyperException) -> str:
    """What is wrong with the words of a command line."""
    # Only an unknown option has possibilities, the closest first; its own message sorts them by name.
    close = vars(error).get("possibilities")
    return f"{error.message}. Did you mean {close[0]}?" if close else error.format_message()


def as_option(name: str, value: str | None) -> str:
    """A name of the job as the command line has it."""
    if name == "devices" and value is not None and value[0].isdigit():
        return f"--gpus {value}"
    if (whole := _OPTIONS.get(f"{name}={value}")) is not None:
        return whole
    option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
    return option if value is None else f"{option} {value if value.startswith(chr(34)) else shlex.quote(value)}"


def complain(refused: Iterable[RefusedLine]) -> None:
    """Say what is left out of a run, the first of it by name."""
    lines = [worded(str(line), as_option) for line in refused]
    more = [f"error: and {len(lines) - TOLD:,} more lines"] if len(lines) > TOLD else []
    say(sys.stderr, [*(f"error: {clean(line)}" for line in lines[:TOLD]), *more])


def in_options(emit: Emit) -> Emit:
    """The emit, with what warnings and failures name of a job in the words of the command line."""

    def heard(kind: str, data: Mapping[str, object]) -> None:
        emit(kind, {**data, "text": worded(str(data["text"]), as_option)} if "text" in data else data)

    return heard


def better(app: typer.Typer, error: Exception, words: Sequence[str]) -> list[str]:
    """The commands that would fit, or need less; those that go on with the run where they can."""
    if not words or not isinstance(error, StagerunError):
        return []
    if isinstance(error, StageOutOfMemory):
        lines = [_resume_words(error), words]
        return [line for fixes in error.alternatives for line in _changed(app, lines, options_of(fixes))]
    return _changed(app, [words], options_of(error.fixes))


def reads_input(words: Sequence[str]) -> bool:
    """Whether a command takes its prompts from standard input, which is gone when the command is pasted."""
    return any(pair in (("--prompt-file", "-"), ("--prompt-file=-",)) for pair in _pairs(words, ()))


def line_words(line: str) -> list[str]:
    """The words behind the program's, of a line that `again` made."""
    return shlex.split(line)[3:]


def options_of(fixes: Fixes) -> dict[str, str]:
    """Fixes as options with their values; "" leaves an option out, "--place denoise" those for that stage."""
    return {f"{as_option(fix.field, None)}{f' {fix.component}' if fix.component else ''}":
            "" if fix.value is None else str(fix.value) for fix in fixes}


def lifted(options: Mapping[str, str]) -> dict[str, str]:
    """For options that are to be left out, how a command says that they no longer hold."""
    found = {"--max-memory": "none", "--allow-offload": "none"}
    return {name: found.get(name) or f"{name.partition(' ')[2]}=auto" for name, value in options.items()
            if not value and (name in found or name.startswith("--place "))}


def again(words: Sequence[str], changes: Mapping[str, str], flags: Collection[str]) -> str:
    """The shell line of `words` with the `changes`: option to value, "" to leave it out; `flags` take no value.

    "--place denoise" stands for the values of --place for that stage.
    """
    dropped: dict[str, set[str]] = {}
    for name, _, stage in (change.partition(" ") for change in changes):
        dropped.setdefault(name, set()).add(stage)
    kept = [pair for pair in _pairs(words, flags) if not _is_dropped(pair, dropped)]
    added = [word for name, value in changes.items() if value for word in (name.partition(" ")[0], value)]
    # What stands behind "--" is no option.
    at = next((at for at, pair in enumerate(kept) if pair == ("--",)), len(kept))
    line = ["python", "-m", "runner", *(word for pair in kept[:at] for word in pair), *added,
            *(word for pair in kept[at:] for word in pair)]
    return " ".join(map(quoted, line))


@contextmanager
def resumable(run: str, store: str, emit: Emit) -> Iterator[Emit]:
    """The emit; an error that comes once the run is recorded leaves with a note that says how to go on."""
    recorded = False

    def heard(kind: str, data: Mapping[str, object]) -> None:
        nonlocal recorded
        recorded = recorded or kind == "stage"
        emit(kind, data)

    try:
        yield heard
    except BaseException as error:
        if recorded and lasts(store):
            error.add_note(RESUME + resume_line(run, store))
        raise


def lasts(store: str) -> bool:
    """Whether a store is there when this process is not."""
    return store != "memory" and not store.startswith("memory:")


def resume_note(error: BaseException) -> str:
    """How to go on after an error, where `resumable` noted it."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(RESUME)), "")


def _resume_words(error: BaseException) -> list[str]:
    """The words of the command that goes on after an error, behind the program's; none where there is none."""
    words = shlex.split(resume_note(error).removeprefix(RESUME))
    return words[words.index("resume") :] if words else []


def _changed(app: typer.Typer, lines: Sequence[Sequence[str]], options: Mapping[str, str]) -> list[str]:
    """The first of the command lines that has these options, with their values; none where none has."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for words in lines if options else ():
        # A run from before has what was said then: leaving an option out leaves it as it was.
        changes = {**options, **lifted(options)} if words and words[0] == "resume" else options
        known = {name: vars(param).get("is_flag", False) for param in group.commands[words[0]].params
                 for name in param.opts} if words else {}
        if not {change.partition(" ")[0] for change in options} - known.keys():
            return [again(words, changes, [name for name, flag in known.items() if flag])]
    return []


def _pairs(words: Sequence[str], flags: Collection[str]) -> Iterator[tuple[str, ...]]:
    """The words, each option together with its value."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            yield (word,)
            yield from ((other,) for other in rest)
        elif word.startswith("--") and "=" not in word and word not in flags:
            yield word, *(value for value in (next(rest, None),) if value is not None)
        else:
            yield (word,)


def _is_dropped(pair: tuple[str, ...], dropped: Mapping[str, Collection[str]]) -> bool:
    name, sign, value = pair[0].partition("=")
    stages = dropped.get(name, ())
    if not stages or (len(pair) == 1 and not sign):
        return False
    return "" in stages or (value if sign else pair[1]).startswith(
        tuple(f"{stage}{end}" for stage in stages for end in "=."))
