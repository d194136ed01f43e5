"""A file of prompts, one a line: as text, or as JSON objects with the names of the command line's options."""

import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from runner.commands.habits import option_for
from runner.text import shown
from stages.errors import InvalidInput
from stages.strict_json import strict_json

FILE_BYTES = 10 * 2**20
LINE_BYTES = 128 * 2**10
LINES = 10_000
KEYS = ("prompt", "negative_prompt", "id", "size", "width", "height", "steps", "guidance", "seed", "count", "out")


@dataclass(frozen=True)
class Entry:
    """What one line asks for."""

    line: int
    """Its number, from 1; 0 for the command line."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What it says, by option; the values are not checked yet."""
    fault: str = ""
    """Why it cannot be read; empty where it can."""


def read_prompts(name: str) -> list[Entry]:
    """The lines of the file `name` (`-`: standard input) that ask for something; InvalidInput for another file.

    A line that cannot be read is an entry with a fault, so that the others can go on without it.
    """
    data = _standard_input() if name == "-" else _file(name)
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise InvalidInput(f"--prompt-file {shown(name)}: line {line} has a NUL byte: it is no UTF-8 text -> save it "
                           f"as UTF-8")
    lines = [(number, line.strip()) for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)]
    prompts = [(number, line) for number, line in lines if line and not line.startswith(b"#")]
    if not prompts:
        raise InvalidInput(f"--prompt-file {shown(name)} has no prompt in it -> write one on each line")
    if len(prompts) > LINES:
        raise InvalidInput(f"--prompt-file {shown(name)} has {len(prompts):,} prompts; the limit is {LINES:,} -> "
                           f"split it")
    as_json = name.endswith(".jsonl") or (name == "-" and prompts[0][1].startswith(b"{"))
    return [_entry(number, line, as_json) for number, line in prompts]


def _standard_input() -> bytes:
    return _at_most(sys.stdin.buffer, "-")


def _file(name: str) -> bytes:
    if not name.endswith((".txt", ".jsonl")):
        raise InvalidInput(f"--prompt-file {shown(name)} must end in .txt (a prompt a line) or .jsonl (an object a "
                         f"line), or be - for standard input")
    try:
        # O_NONBLOCK: a FIFO would wait for ever.
        with open(os.open(Path(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidInput(f"--prompt-file {shown(name)} is not a plain file -> - reads standard input")
            return _at_most(file, name)
    except OSError as error:
        raise InvalidInput(f"cannot read --prompt-file {shown(name)}: {error.strerror}") from None


def _at_most(file: BinaryIO, name: str) -> bytes:
    data = file.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise InvalidInput(f"--prompt-file {shown(name)} has more than {FILE_BYTES:,} bytes -> split it")
    return data


def _entry(number: int, line: bytes, as_json: bool) -> Entry:
    if len(line) > LINE_BYTES:
        return Entry(number, fault=f"it has {len(line):,} bytes; the limit is {LINE_BYTES:,} -> shorten it")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Entry(number, fault=f"it is not valid UTF-8 at byte {error.start} -> save the file as UTF-8")
    return _object(number, text) if as_json else Entry(number, {"prompt": text})


def _object(number: int, text: str) -> Entry:
    try:
        found = strict_json(text)
    except RecursionError:
        return Entry(number, fault="it is nested too deeply -> write one flat object")
    except ValueError as error:
        return Entry(number, fault=f'it is no JSON object ({error}) -> such as {{"prompt": "a red fox"}}')
    if not isinstance(found, dict):
        return Entry(number, fault=f'it is a JSON {type(found).__name__} -> such as {{"prompt": "a red fox"}}')
    unknown = next((key for key in found if key not in KEYS), None)
    if unknown is not None:
        habit = (option_for(unknown, [f"--{key.replace('_', '-')}" for key in KEYS]) or "").removeprefix("--")
        close = [habit.replace("-", "_")] if habit else get_close_matches(unknown, KEYS, 1)
        hint = f"did you mean {close[0]}?" if close else f"a line may say {', '.join(KEYS)}"
        return Entry(number, found, f"it has the unknown key {shown(unknown)} -> {hint}")
    return Entry(number, found)
