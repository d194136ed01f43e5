"""What a command line ends with when it fails: a line and an exit code, and commands that would do better."""

import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import typer

from runner.commands.settings import unsaid_store
from runner.commands.words import Said, Spellings, again, line_words, read, reads_input, spellings
from runner.events import Emit
from runner.job import RefusedLine
from runner.reports.repeat import resume_line
from runner.terminal import TolerantStream, say, say_json
from runner.text import clean, shown, wrapped
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
    as_own,
    worded,
)
from stages.wording import counted

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
            "degrade=False": "--no-degrade", "overwrite=True": "--overwrite", "download=True": "no plan command"}


def refuse(
    message: str, code: int, error: BaseException | None = None, more: Sequence[str] = (),
    next_commands: Sequence[str] = (), *, as_json: bool = False,
) -> int:
    """Say in a line what is wrong, how to go on if the error knows, and then lines of arithmetic and commands.

    With `as_json` standard output has the same as one JSON object. Gives the exit code.
    """
    basis = error.basis if isinstance(error, DoesNotFit) else None
    head = clean(message[: 2 * MESSAGE])
    note = "" if error is None else resume_note(error)
    arithmetic = [clean(line) for line in more]
    if as_json:
        say_json(sys.stdout, {
            "kind": "error", "error": "InvalidInput" if error is None else type(error).__name__, "exit_code": code,
            "reason": head, "arithmetic": arithmetic,
            "fixes": [asdict(fix) for fix in getattr(error, "fixes", ())], "next": list(next_commands),
            "resume": note.removeprefix(RESUME) or None,
            **({} if basis is None else {"assumed": list(basis.assumed), "shapes": basis.shapes or None}),
        })
    stderr = TolerantStream(sys.stderr)
    told = [*arithmetic, *(() if basis is None else map(clean, basis.lines()))]
    lines = [f"error: {head}{note}", *(part for line in told for part in wrapped(line, stderr.columns, "  ")),
             *(f"next: {command}" for command in next_commands)]
    stderr.write("".join(f"{line}\n" for line in lines))
    stderr.flush()
    return code


def failed(
    app: typer.Typer, error: Exception, words: Sequence[str], *, verbose: bool, as_json: bool = False,
    plans: Callable[[Sequence[str]], bool] = lambda words: True,
) -> int:
    """Say what an error was, with commands made of the `words` of this one that would do better; the exit code.

    Of the commands those are said that can be pasted, and that `plans` finds to fit.
    """
    if verbose:
        TolerantStream(sys.stderr).write("".join(traceback.format_exception(error)))
    code = next((code for kind, code in CODES if isinstance(error, kind)), 1)
    if code == 1:
        hint = "" if verbose else " -> run again with -v to see where"
        return refuse(f"unexpected {type(error).__name__}: {str(error)[:MESSAGE]}{hint}", code, error,
                      as_json=as_json)
    if isinstance(error, StagerunError):
        error.text = as_own(error.text, words)
    text = error.message(as_option) if isinstance(error, StagerunError) else str(error) or "out of host memory"
    # What a plan was refused for has a line for each strategy.
    head, *lines = text.splitlines() if isinstance(error, DoesNotFit) else [text]
    if isinstance(error, DoesNotFit):
        head = f"does not fit: {head.removesuffix(' does not fit.')}"
    said = [] if reads_input(words, spellings(app, words)) else [
        line for line in better(app, error, words) if plans(line_words(line))]
    if isinstance(error, DoesNotFit) and not said:
        lines += _own_sizes(error.fixes, read(words, spellings(app, words)))
    return refuse(head, code, error, lines, said, as_json=as_json)


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
    more = [f"error: and {counted(len(lines) - TOLD, 'more line')}"] if len(lines) > TOLD else []
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


def _own_sizes(fixes: Fixes, words: Iterable[Said]) -> list[str]:
    """What no command says of a smaller size: that lines of a prompt file keep their own."""
    sizes = [fix.value for fix in fixes if fix.field == "size"]
    files = [said.value for said in words if said.option == "--prompt-file" and said.value]
    return [f"-> a line of {shown(files[-1])} that says a size keeps it: there, say {sizes[-1]} too"
            ] if sizes and files else []


def options_of(fixes: Fixes) -> dict[str, str]:
    """Fixes as options with their values; "" leaves an option out, "--place denoise" those for that stage."""
    return {f"{as_option(fix.field, None)}{f' {fix.component}' if fix.component else ''}":
            "" if fix.value is None else str(fix.value) for fix in fixes}


def lifted(options: Mapping[str, str], words: Sequence[str], known: Spellings) -> dict[str, str]:
    """For options that are to be left out, how a command says that they no longer hold.

    That takes a word where another place than the command line says them: a run from before, a file or a variable.
    """
    found = {"--max-memory": "none", "--allow-offload": "none"}
    said = {each.option for each in read(words, known)} if words[:1] != ["resume"] else set()
    return {name: found.get(name) or f"{name.partition(' ')[2]}=auto" for name, value in options.items()
            if not value and name.partition(" ")[0] not in said and (name in found or name.startswith("--place "))}


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
            error.add_note(RESUME + resume_line(run, store, unsaid_store()))
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
    for words in lines if options else ():
        known = spellings(app, words)
        if not {change.partition(" ")[0] for change in options} - known.keys():
            return [again(words, {**options, **lifted(options, words, known)}, known)]
    return []
