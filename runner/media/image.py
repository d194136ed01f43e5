"""A picture's file that says how it was made, and the way back from it to a request."""

import io
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runner.inputs import INPUTS, PIXELS
from runner.job_fields import tile
from runner.media.formats import NAMES, card_text, encoded, format_of
from runner.request import FilledRequest
from runner.text import shown
from stages.errors import InvalidInput
from stages.families import FAMILIES
from stages.models.lora import LoraRequest
from stages.models.scheduler import WHOLE, SchedulerRequest

SCHEMA = 1
PACKAGES = ("stagerun", "diffusers", "torch", "transformers")
TEXT_BYTES = 256 * 2**10
FILE_BYTES = 256 * 2**20
# What says of a file that it is a preview, and may go when its picture is there.
PREVIEW = "runner-preview"


@dataclass(frozen=True)
class PictureCard:
    """What a picture says of how it was made."""

    request: FilledRequest
    """What was asked for."""
    family: str
    """The model family."""
    model: str
    """Where the model came from: a hub id or a folder."""
    identity: str
    """What the model was: a commit or a fingerprint."""
    dtype: Mapping[str, str]
    """The type of each component."""
    loras: tuple[LoraRequest, ...] = ()
    """The LoRAs that were merged into it."""
    scheduler: SchedulerRequest | None = None
    """What took the place of the model's scheduler."""
    tile: int = 0
    """Pixels along a side of the tiles that it was decoded in; 0 where that was done whole."""

    @property
    def revision(self) -> str | None:
        """The commit of a model from the hub."""
        return commit(self.identity, self.model)


def commit(identity: str, model: str) -> str | None:
    """The commit in the identity of a hub model; None for a folder."""
    found = identity.removeprefix(f"{model}@")
    return found if re.fullmatch("[0-9a-f]{40}", found) else None


def png(pixels: Any, card: Mapping[str, Any] | None) -> bytes:
    """The PNG file of uint8 pixels [height, width, 3], with `card` in its `runner` and `parameters` texts."""
    return encoded("PNG", pixels, card, "" if card is None else parameters(card))


def picture_file(path: Path, pixels: Any, card: Mapping[str, Any] | None) -> bytes:
    """The file for uint8 pixels [height, width, 3] that the suffix of `path` asks for, with `card` in it."""
    return encoded(format_of(path), pixels, card, "" if card is None else parameters(card))


def preview_png(pixels: Any) -> bytes:
    """The PNG file of a preview, uint8 pixels [height, width, 3], that `is_preview` knows again."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(PREVIEW, "replaced by the finished picture")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def is_preview(path: Path) -> bool:
    """Whether the file at `path` is a preview that a run made, and no picture of somebody's."""
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with Image.open(path, formats=("PNG",)) as image:
            return PREVIEW in image.info
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False


def card_of(request: FilledRequest, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that is needed to make the picture again, as JSON; `facts` are the run's."""
    every = {name: getattr(request, name) for name in (*INPUTS, "index")}
    inputs = {name: value for name, value in every.items()
             if value is not None or name not in INPUTS or not INPUTS[name].optional}
    return {"schema": SCHEMA, **inputs, **facts, "versions": versions()}


def parameters(card: Mapping[str, Any]) -> str:
    """The text that other programs read: the prompt, the negative one, and a last line of `Name: value` fields."""
    fields = {
        "Steps": card["steps"],
        "Sampler": card.get("scheduler", {}).get("name") or None,
        "CFG scale": card["guidance"],
        "Seed": card["seed"],
        "Size": f"{card['width']}x{card['height']}",
        "Model": Path(str(card["model"])).name,
        "LoRA": ", ".join(f"{Path(each['source']).stem}:{each['scale']:g}" for each in card.get("loras", ())) or None,
        "Version": " ".join(("stagerun", card["versions"].get("stagerun", ""))).strip(),
    }
    pairs = (f"{name}: {_quoted(str(value))}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {card['negative_prompt']}" if "negative_prompt" in card else ""
    return f"{card['prompt']}{negative}\n{', '.join(pairs)}"


@cache
def versions() -> dict[str, str]:
    """The installed versions of what decides about pixels."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def shows(path: Path, pixels: Any) -> bool:
    """Whether the file at `path` is a picture of exactly these uint8 pixels [height, width, 3].

    A JPEG is where it has what a JPEG of them has.
    """
    from PIL import Image, UnidentifiedImageError

    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    kind = format_of(path)
    try:
        with Image.open(path, formats=(kind,)) as image:
            height, width = pixels.shape[:2]
            # The size first: a file may claim more pixels than there is memory for.
            if image.size != (width, height) or image.mode != "RGB":
                return False
            if kind != "JPEG":
                return bool(image.tobytes() == pixels.tobytes())
            with Image.open(io.BytesIO(encoded(kind, pixels)), formats=(kind,)) as same:
                return bool(image.tobytes() == same.tobytes())
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return False


def read_card(path: str | Path) -> PictureCard:
    """What the picture at `path` says; InvalidInput where it says nothing, or nothing that could be true."""
    try:
        card = _read(Path(path))
        inputs: dict[str, Any] = {
            name: card.get(name) if each.optional else card[name] for name, each in INPUTS.items()}
        for each in INPUTS.values():
            each.check(inputs[each.name])
        request = FilledRequest(**inputs)
        family, model, identity = (_text(card, name) for name in ("family", "model", "identity"))
        if family not in FAMILIES:
            raise InvalidInput(f"family {shown(family)} is unknown here")
        return PictureCard(request, family, model, identity, _dtype(card), _loras(card),
                           _scheduler(card), _tile(card))
    except KeyError as error:
        raise InvalidInput(f"{path}: its metadata lack {error}") from None
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: {error}") from None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def _read(path: Path) -> dict[str, Any]:
    # O_NONBLOCK: a FIFO would wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidInput("it is not a plain file")
        if os.fstat(file.fileno()).st_size > FILE_BYTES:
            raise InvalidInput(f"it has more than {FILE_BYTES:,} bytes: it is no picture of ours")
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file, formats=NAMES) as image:
                if image.format == "PNG" and "runner" not in image.info and image.width * image.height <= PIXELS:
                    # Texts behind the pixels are read with them.
                    image.load()
                text = card_text(image)
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError, struct.error) as error:
            raise InvalidInput("it is not a PNG, WebP or JPEG, or a damaged one") from error
    if text is None:
        raise InvalidInput("it has no runner metadata: made by another program, or without them")
    if len(text) > TEXT_BYTES:
        raise InvalidInput(f"its metadata have {len(text):,} letters; the limit is {TEXT_BYTES:,}")
    card = json.loads(text, parse_constant=_no_constant)
    if not isinstance(card, dict):
        raise InvalidInput("its metadata are not an object")
    if type(card.get("schema")) is not int or card["schema"] != SCHEMA:
        raise InvalidInput(f"its metadata have schema {shown(str(card.get('schema')))}, this version reads {SCHEMA}")
    return card


def _text(card: Mapping[str, Any], name: str) -> str:
    value = card[name]
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():
        raise InvalidInput(f"{name} in its metadata is no plain text")
    return value


def _dtype(card: Mapping[str, Any]) -> dict[str, str]:
    value = card["dtype"]
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise InvalidInput("dtype in its metadata is not a name per component")
    return value


def _tile(card: Mapping[str, Any]) -> int:
    value = card.get("tile", 0)
    if type(value) is not int or tile(value) is None:
        raise InvalidInput(f"tile in its metadata is {shown(repr(value))}")
    return value


def _loras(card: Mapping[str, Any]) -> tuple[LoraRequest, ...]:
    value = card.get("loras", [])
    if not isinstance(value, list):
        raise InvalidInput("loras in its metadata are no list")
    return tuple(_lora(each) for each in value)


def _scheduler(card: Mapping[str, Any]) -> SchedulerRequest | None:
    match card.get("scheduler"):
        case None:
            return None
        case {"name": str(name), "config": dict(config), **rest} if rest in ({}, {WHOLE: True}):
            return SchedulerRequest(name, config, bool(rest))
    raise InvalidInput("scheduler in its metadata is not a name and a config")


def _lora(value: Any) -> LoraRequest:
    match value:
        case {"source": str(), "sha256": str(digest), "scale": float(scale)} if re.fullmatch("[0-9a-f]{64}", digest):
            return LoraRequest(_text(value, "source"), scale, digest)
    raise InvalidInput("a LoRA in its metadata lacks its source, sha256 or scale")


def _no_constant(name: str) -> Any:
    raise InvalidInput(f"its metadata hold {name}, which is no JSON")
