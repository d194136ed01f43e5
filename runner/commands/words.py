"""The words of a command line, each with the option that it belongs to: to change some of them and keep the rest."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import typer
from typer.core import TyperGroup
from typer.main import get_command

from runner.reports.repeat import line

# By each spelling of an option, its first long one, and whether it takes no value.
Spellings = Mapping[str, tuple[str, bool]]


@dataclass(frozen=True)
class Said:
    """One thing that a command line says."""

    words: tuple[str, ...]
    """The words that say it."""
    option: str = ""
    """The option in its first long spelling; empty for an argument, and for `--`."""
    value: str | None = None
    """What is said of the option, or the argument; None for an option without a value, and for `--`."""


def spellings(app: typer.Typer, words: Sequence[str]) -> Spellings:
    """The options of the command that the words begin with."""
    command = get_command(app)
    for word in words:
        if not isinstance(command, TyperGroup) or word not in command.commands:
            break
        command = command.commands[word]
    return {spelling: (next((each for each in param.opts if each.startswith("--")), param.opts[0]),
                       bool(vars(param).get("is_flag", False)))
            for param in command.params for spelling in param.opts if spelling.startswith("-")}


def read(words: Iterable[str], known: Spellings) -> Iterator[Said]:
    """What the words say, one thing after the other; an option that is not `known` takes a value."""
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if word == "--":
            yield Said((word,))
            yield from (Said((other,), value=other) for other in rest)
        elif word.startswith("--"):
            option, flag = known.get(name, (name, False))
            if sign:
                yield Said((word,), option, value)
            else:
                yield Said((word,), option) if flag else _with_next((word,), option, rest)
        elif word.startswith("-") and len(word) > 1:
            yield _short(word, known, rest)
        else:
            yield Said((word,), value=word)


def again(words: Sequence[str], changes: Mapping[str, str], known: Spellings) -> str:
    """The shell line of `words` with the `changes`: option to value, "" to leave it out.

    "--place denoise" stands for the values of --place for that stage, and a size for the width and the height too.
    """
    dropped: dict[str, set[str]] = {}
    for name, _, stage in (change.partition(" ") for change in changes):
        for option in ("--size", "--width", "--height") if name == "--size" else (name,):
            dropped.setdefault(option, set()).add(stage)
    kept = [said for said in read(words, known) if not _is_dropped(said, dropped)]
    added = [word for name, value in changes.items() if value for word in (name.partition(" ")[0], value)]
    # What stands behind "--" is no option.
    at = next((at for at, said in enumerate(kept) if said.words == ("--",)), len(kept))
    return line(*(word for said in kept[:at] for word in said.words), *added,
                *(word for said in kept[at:] for word in said.words))


def line_words(text: str) -> list[str]:
    """The words behind the program's, of a line that `line` made."""
    program, *words = shlex.split(text)
    return words if program == "stagerun" else words[2:]


def with_prompt(words: Sequence[str], prompt: str, known: Spellings) -> list[str]:
    """The words of a command line that reads its prompt from standard input, with the prompt written out."""
    found: list[str] = []
    for said in read(words, known):
        is_read = said.value == "-" and said.option in ("", "--prompt")
        found += [f"--prompt={prompt}"] if is_read else said.words
    return found


def reads_input(words: Sequence[str], known: Spellings) -> bool:
    """Whether a command takes its prompts from standard input, which is gone when the command is pasted."""
    return any(said.option == "--prompt-file" and said.value == "-" for said in read(words, known))


def _with_next(words: tuple[str, ...], option: str, rest: Iterator[str]) -> Said:
    value = next(rest, None)
    return Said(words, option) if value is None else Said((*words, value), option, value)


def _short(word: str, known: Spellings, rest: Iterator[str]) -> Said:
    """A word of one-letter options: those without a value, and at most one with what follows it."""
    option = ""
    for at, letter in enumerate(word[1:], 2):
        option, flag = known.get(f"-{letter}", ("", True))
        if not flag:
            return Said((word,), option, word[at:]) if word[at:] else _with_next((word,), option, rest)
    return Said((word,), option)


def _is_dropped(said: Said, dropped: Mapping[str, set[str]]) -> bool:
    stages = dropped.get(said.option, set()) if said.option else set()
    if not stages or said.value is None:
        return False
    return "" in stages or said.value.startswith(tuple(f"{stage}{end}" for stage in stages for end in "=."))
