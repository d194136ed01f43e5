"""Names of layers as PEFT's configs mean them: by their end, or by regular expressions of a stranger, in bounded time.

An engine that goes back and tries again could run for ever on one, so these are gone through once, with all places
where they can be at a time. Places in a name are the bits of a number.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Letters of all the regular expressions of a table, and how deep their parentheses may be.
LONGEST, DEEPEST = 1000, 20
# What goes on from here is one letter of a name, and how often; or a parenthesis, `|`, `^` or `$`.
_WORD = re.compile(r"(\\[dw.]|\[\^?[\w.]-[\w.]\]|\[\^?[\w.]+\]|[\w.-])([*+?]?)|\((?:\?:)?|[|)^$]")
# To PEFT the dot of a plain name is any letter; no two layers of a model differ in that.
_PLAIN = re.compile(r"\^?\w+(\.\w+)*")


class Unreadable(ValueError):
    """A pattern of a kind that is not read; its text is the pattern."""


@dataclass(frozen=True)
class _Letter:
    kind: re.Pattern[str]
    """What it may be."""
    times: str
    """`*`, `+`, `?` or nothing for once."""

    def ends(self, name: str, begins: int) -> int:
        fit = sum(1 << at for at, letter in enumerate(name) if self.kind.fullmatch(letter))
        ends = (begins & fit) << 1
        while self.times in ("*", "+") and ends | (ends & fit) << 1 != ends:
            ends |= (ends & fit) << 1
        return ends | begins if self.times in ("*", "?") else ends


@dataclass(frozen=True)
class _Border:
    last: bool
    """Whether it is the end."""

    def ends(self, name: str, begins: int) -> int:
        return begins & (1 << len(name) if self.last else 1)


@dataclass(frozen=True)
class _Choice:
    ways: Sequence[Sequence["_Letter | _Border | _Choice"]]
    """What may stand there, part by part."""

    def ends(self, name: str, begins: int) -> int:
        found = 0
        for way in self.ways:
            at = begins
            for part in way:
                at = part.ends(name, at)
            found |= at
        return found


class LayerPatterns:
    """Names and regular expressions for layers, the first of which counts; Unreadable for one that is not read."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._made: list[tuple[int, _Choice]] = []
        self._texts = list(patterns)
        letters = 0
        for index, text in enumerate(self._texts):
            if _PLAIN.fullmatch(text):
                (self._whole if text.startswith("^") else self._plain).setdefault(text.removeprefix("^"), index)
                continue
            letters += len(text)
            if letters > LONGEST:
                raise Unreadable(text)
            self._made.append((index, _parsed(text)))

    def first(self, name: str) -> str | None:
        """The pattern that means a layer: the whole of its name, or what is behind one of its dots."""
        begins = sum(1 << at + 1 for at, letter in enumerate(name) if letter == ".") | 1
        found = [self._plain[end] for end in ends_of(name) if end in self._plain]
        found += [self._whole[name]] if name in self._whole else []
        found += [index for index, made in self._made if made.ends(name, begins) >> len(name)]
        return self._texts[min(found)] if found else None


def ends_of(name: str) -> list[str]:
    """A layer's name, and what is behind each of its dots."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def matches_whole(pattern: str, name: str) -> bool:
    """Whether a regular expression means the whole of a name; Unreadable for one that is not read."""
    if len(pattern) > LONGEST:
        raise Unreadable(pattern)
    return bool(_parsed(pattern).ends(name, 1) >> len(name))


def _parsed(text: str) -> _Choice:
    words = list(_WORD.finditer(text))
    if "".join(word[0] for word in words) != text:
        raise Unreadable(text)
    return _choice(text, iter(words), 0)


def _choice(text: str, words: Iterator[re.Match[str]], depth: int) -> _Choice:
    ways: list[list[_Letter | _Border | _Choice]] = [[]]
    for word in words:
        if word[1]:
            ways[-1].append(_Letter(re.compile(word[1]), word[2]))
        elif word[0] == "|":
            ways.append([])
        elif word[0] in ("^", "$"):
            ways[-1].append(_Border(word[0] == "$"))
        elif word[0].startswith("(") and depth < DEEPEST:
            ways[-1].append(_choice(text, words, depth + 1))
        elif word[0] == ")" and depth:
            return _Choice(ways)
        else:
            raise Unreadable(text)
    if depth:
        raise Unreadable(text)
    return _Choice(ways)
