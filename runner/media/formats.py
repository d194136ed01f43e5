"""The files that a picture can be: PNG and WebP, which keep every pixel, and JPEG, which does not; what each says.

A PNG has the card in its text `runner`. A JPEG and a WebP have it in EXIF: the card as MakerNote, and as UserComment
what other programs read.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.text import shown
from stages.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

# By suffix, the name that Pillow has for the format.
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
SUFFIXES = ".png, .webp, .jpg or .jpeg"
NAMES = tuple(dict.fromkeys(FORMATS.values()))
# So that a file can say all of a picture, and hold all of it.
LONGEST_PROMPT, LONGEST_SIDE = {"JPEG": 24 * 2**10}, {"WEBP": 16383}
JPEG_QUALITY = 95
_EXIF_OF_JPEG = 65_500
_EXIF, _MAKER_NOTE, _USER_COMMENT, _SOFTWARE = 0x8769, 0x927C, 0x9286, 0x0131
_OURS, _UNICODE = b"stagerun\0", b"UNICODE\0"


def format_of(path: Path) -> str:
    """The format that the suffix of a path asks for; InvalidInput for one that is not written."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise InvalidInput(f"`out` {shown(path.name)} must end in {SUFFIXES}")
    return found


def is_lossy(path: Path) -> bool:
    """Whether a file of this name has not quite the pixels of its picture."""
    return FORMATS.get(path.suffix.lower()) == "JPEG"


def check_room(path: Path, prompts: int, side: int) -> None:
    """Raise InvalidInput where a format has no room for prompts of so many bytes, or a side of so many pixels."""
    kind = format_of(path)
    if prompts > LONGEST_PROMPT.get(kind, prompts):
        raise InvalidInput(f"`out` {shown(path.name)}: the metadata of a JPEG have no room for prompts of "
                           f"{prompts:,} bytes; the limit is {LONGEST_PROMPT[kind]:,} -> a name with .png or .webp")
    if side > LONGEST_SIDE.get(kind, side):
        raise InvalidInput(f"`out` {shown(path.name)}: a WebP has at most {LONGEST_SIDE[kind]:,} pixels a side, not "
                           f"{side:,} -> a name with .png")


def encoded(kind: str, pixels: Any, card: Mapping[str, Any] | None = None, parameters: str = "") -> bytes:
    """The file of uint8 pixels [height, width, 3] in a format, with `card` and the `parameters` text in it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings(kind, card, parameters))
    return file.getvalue()


def settings(kind: str, card: Mapping[str, Any] | None, parameters: str) -> dict[str, Any]:
    """What PIL is told to write a picture in a format, with `card` and the `parameters` text in it."""
    if kind == "PNG":
        return {"pnginfo": _texts(card, parameters)}
    if kind == "WEBP":
        return {"lossless": True, "exif": _exif(card, parameters, None)}
    return {"quality": JPEG_QUALITY, "subsampling": 0, "exif": _exif(card, parameters, _EXIF_OF_JPEG)}


def card_text(image: "Image") -> str | None:
    """The text of the card that an opened picture has; None where it has none."""
    if image.format == "PNG":
        text = image.info.get("runner")
        return text if isinstance(text, str) else None
    note = image.getexif().get_ifd(_EXIF).get(_MAKER_NOTE)
    if not isinstance(note, bytes) or not note.startswith(_OURS):
        return None
    return note.removeprefix(_OURS).decode("utf-8", "strict")


def _dumped(card: Mapping[str, Any]) -> str:
    return json.dumps(card, ensure_ascii=False, allow_nan=False, sort_keys=True)


def _texts(card: Mapping[str, Any] | None, parameters: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if card is not None:
        info.add_text("parameters", parameters)
        info.add_itxt("runner", _dumped(card))
    return info


def _exif(card: Mapping[str, Any] | None, parameters: str, most: int | None) -> bytes:
    """The EXIF block; what other programs read is left out where there is no room for both."""
    from PIL import Image

    if card is None:
        return b""
    exif: Exif = Image.Exif()
    exif[_SOFTWARE] = f"stagerun {card.get('versions', {}).get('stagerun', '')}".strip()
    inner = exif.get_ifd(_EXIF)
    inner[_MAKER_NOTE] = _OURS + _dumped(card).encode()
    inner[_USER_COMMENT] = _UNICODE + parameters.encode("utf-16-be")
    if most is not None and len(exif.tobytes()) > most:
        del inner[_USER_COMMENT]
    return exif.tobytes()
