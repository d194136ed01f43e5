"""Every place where the packages wait for a card or have one stream wait for another, to be left out in turn."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a call must be named to be one, and the packages in which streams are used.
NAMES = {"synchronize", "wait_event", "wait_stream", "record_stream", "takes_turns", "enter"}
FOLDERS = ("stages", "runner")


@dataclass(frozen=True)
class Wait:
    """A statement that does nothing but wait."""

    file: str
    """Its file, from the root."""
    first: int
    """The number of its first line, from 1."""
    last: int
    """The number of its last line."""
    name: str
    """What is called."""

    def __str__(self) -> str:
        return f"{self.file}:{self.first} {self.name}"

    def left_out(self) -> str:
        """The text of the file without it."""
        lines = (ROOT / self.file).read_text().splitlines(keepends=True)
        begin = lines[self.first - 1]
        indent = begin[:len(begin) - len(begin.lstrip())]
        return "".join([*lines[:self.first - 1], f"{indent}pass\n", *lines[self.last:]])


def waits() -> Iterator[Wait]:
    """All of them, by file and line."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    called = node.value.func
                    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                    if name in NAMES and path.name != "heartbeat.py":
                        yield Wait(str(path.relative_to(ROOT)), node.lineno, node.end_lineno or node.lineno, name)
