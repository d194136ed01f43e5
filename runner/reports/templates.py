"""The templates of pages and notebooks: whatever a value says is escaped, and cannot turn the reading direction."""

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from runner.text import visible


@dataclass(frozen=True)
class Thumbnail:
    """A picture that is in a page."""

    data: Markup
    """Its PNG file in base64."""
    width: int
    """Its width in pixels."""
    height: int
    """Its height in pixels."""


def thumbnail(pixels: Any, side: int) -> Thumbnail:
    """Pixels, uint8 [height, width, 3], as a picture of at most `side` pixels a side."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return Thumbnail(Markup(base64.b64encode(file.getvalue()).decode()), picture.width, picture.height)


def render(name: str, **values: Any) -> str:
    """The template of this name with these values; ValueError for those that it cannot show."""
    try:
        return _environment().get_template(name).render(values)
    except TemplateError as error:
        raise ValueError(str(error)) from error


def call(name: str, macro: str, *values: Any, **named: Any) -> str:
    """What a macro of the template of this name gives for these values; ValueError for those that it cannot show."""
    try:
        return str(getattr(_environment().get_template(name).module, macro)(*values, **named))
    except TemplateError as error:
        raise ValueError(str(error)) from error


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(value),
    )
    found.filters["cut"] = visible
    return found
