"""HTML by hand, without scripts: everything that is said is escaped, and colors follow light and dark."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from runner.text import BIDI

LINE = "rgba(127,127,127,.35)"
CELL = f"padding:2px 10px;border-bottom:1px solid {LINE};vertical-align:top"
FAINT = "opacity:.7"


def said(value: object, most: int = 2000) -> str:
    """A value as text of a page: escaped, cut at `most` characters, its direction kept to itself."""
    text = str(value)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    # Controls have no place in HTML, and surrogates none in UTF-8; line ends are spaces there anyway.
    plain = "".join(c if c.isprintable() or c in " \n\t" else "\ufffd" for c in text if c not in BIDI)
    return html.escape(plain, quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table of cells that are HTML already; all but the first `words` columns are numbers, to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("left" if at < words else "right" for at in range(len(cells)))
        return "".join(f'<{tag} style="{CELL};text-align:{side}">{cell}</{tag}>'
                       for cell, side in zip(cells, sides, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return (f'<table style="border-collapse:collapse;background:none"><thead><tr>{line("th", head)}</tr></thead>'
            f"<tbody>{body}</tbody></table>")


def image(pixels: Any, side: int, words: str) -> str:
    """An <img> of uint8 pixels [height, width, 3], at most `side` pixels wide and high; `words` stand in for it."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return (f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" '
            f'width="{picture.width}" height="{picture.height}" alt="{said(words, 200)}">')


def block(*parts: str) -> str:
    """Parts below one another, as the one element that a notebook shows."""
    return f'<div style="line-height:1.5">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'
