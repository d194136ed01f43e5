"""Words and numbers as people read them: bytes, counts, and text of others without what it could do to a terminal."""

import re
import shlex
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from stages.wording import counted

# What is typed as it stands: a command, which ends its line, an option with its value, and what is in backquotes.
_TYPED = re.compile(r"(?<=[:>] )(?:hf|pip|python3?|stagerun) .*|--[a-z][a-z0-9-]* [^\s-]\S*|`[^`]*`")
_HELD = "\0"
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def gib(count: int) -> str:
    """Bytes for people: `1.5 GiB`, `12.0 MiB`, `0 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def clean(text: str) -> str:
    """`text` on one line without what moves a cursor or turns the reading direction."""
    return harmless(" ".join(text.split()))


def harmless(line: str) -> str:
    """A line with its spaces as they are, without what moves a cursor or turns the reading direction."""
    if line.isascii() and line.isprintable():
        return line
    return "".join(c for c in line if c not in BIDI and unicodedata.category(c) not in ("Cc", "Cs"))


def visible(value: object, most: int = 2000) -> str:
    """A value as text for a page, cut at `most` characters, without what turns the reading direction.

    Controls have no place in HTML, and surrogates none in UTF-8: each becomes U+FFFD, but line ends and tabs stay.
    """
    text = str(value)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() or c in " \n\t" else "\ufffd" for c in text if c not in BIDI)


def shown(text: str) -> str:
    """`text` quoted for an error message: ASCII, and cut where it is long."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


def choices(word: str, of: Iterable[str]) -> str:
    """What to choose instead of a word, the nearest first in words: `did you mean flux? choose from flux, sd3`."""
    known = list(of)
    close = get_close_matches(word.lower(), known, 1)
    return f"{f'did you mean {close[0]}? ' if close else ''}choose from {', '.join(known)}"


def wrapped(line: str, columns: int, indent: str = "") -> list[str]:
    """A line in lines of at most so many columns, the first of them behind `indent` and the others behind two more.

    A word that is longer, such as a path, is left whole, and so is what is to be pasted: a command at the end.
    """
    held = _TYPED.sub(lambda found: found[0].replace(" ", _HELD), line)
    parts = textwrap.wrap(held, columns, initial_indent=indent, subsequent_indent=f"{indent}  ",
                          break_long_words=False, break_on_hyphens=False)
    return [part.replace(_HELD, " ") for part in parts] or [indent]


def quoted(word: str) -> str:
    """A word as shells read it; what would move the cursor or turn the reading direction is spelled out."""
    if word.isprintable():
        return shlex.quote(word)
    spelled = (f"\\{c}" if c in "\\'" else c if c.isprintable() else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(spelled)}'"


def cut(text: str, most: int) -> str:
    """`text` in at most so many characters, with three dots where some are left out."""
    return text if len(text) <= most else f"{text[: max(0, most - 3)]}..."[:most]


def table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell, with the cells to the left or to the `right`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    side = ">" if right else "<"
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def pictures(count: int) -> str:
    """Such as `1 picture`, `2 pictures`."""
    return counted(count, "picture")
