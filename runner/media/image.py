"""A picture as a PNG that says how it was made, and the way back from it to a request."""

import io
import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from runner.request import Request
from runner.text import shown
from stages.families import FAMILIES
from stages.models.lora import LoraRequest

SCHEMA = 1
PACKAGES = ("stagerun", "diffusers", "torch", "transformers")
REQUEST = ("prompt", "width", "height", "steps", "guidance", "seed", "text_tokens")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_BYTES = 256 * 2**10
CHUNKS = 100_000


@dataclass(frozen=True)
class Like:
    """What a picture says of how it was made: the request, and the model that it was asked of."""

    request: Request
    family: str
    model: str
    identity: str
    dtype: Mapping[str, str]
    loras: tuple[LoraRequest, ...] = ()

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
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if card is not None:
        info.add_text("parameters", parameters(card))
        info.add_itxt("runner", json.dumps(card, ensure_ascii=False, allow_nan=False, sort_keys=True))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def card_of(request: Request, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that is needed to make the picture again, as JSON; `facts` are the run's."""
    asked = {name: getattr(request, name) for name in (*REQUEST, "index")}
    if request.negative_prompt is not None:
        asked["negative_prompt"] = request.negative_prompt
    return {"schema": SCHEMA, **asked, **facts, "versions": versions()}


def parameters(card: Mapping[str, Any]) -> str:
    """The text that other programs read: the prompt, the negative one, and a last line of `Name: value` fields."""
    fields = {
        "Steps": card["steps"],
        "Sampler": card.get("sampler"),
        "CFG scale": card["guidance"],
        "Seed": card["seed"],
        "Size": f"{card['width']}x{card['height']}",
        "Model": Path(str(card["model"])).name,
        "LoRA": ", ".join(f"{Path(each['source']).stem}:{each['scale']:g}" for each in card.get("loras", ())) or None,
        "Version": " ".join(("stagerun", card["versions"].get("stagerun", ""))).strip(),
    }
    told = (f"{name}: {_quoted(str(value))}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {card['negative_prompt']}" if "negative_prompt" in card else ""
    return f"{card['prompt']}{negative}\n{', '.join(told)}"


@cache
def versions() -> dict[str, str]:
    """The installed versions of what decides about pixels."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def shows(path: Path, pixels: Any) -> bool:
    """Whether the file at `path` is a picture of exactly these uint8 pixels [height, width, 3]."""
    from PIL import Image, UnidentifiedImageError

    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            height, width = pixels.shape[:2]
            # The size first: a file may claim more pixels than there is memory for.
            return image.size == (width, height) and image.mode == "RGB" and image.tobytes() == pixels.tobytes()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False


def like(path: str | Path) -> Like:
    """What the picture at `path` says; ValueError where it says nothing, or nothing that could be true."""
    try:
        card = _card(Path(path))
        request = Request(**{name: card[name] for name in REQUEST}, negative_prompt=card.get("negative_prompt"))
        family, model, identity = (_text(card, name) for name in ("family", "model", "identity"))
        said = Like(request, family, model, identity, _dtype(card), _loras(card))
        if said.family not in FAMILIES:
            raise ValueError(f"family {shown(said.family)} is unknown here")
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lack {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return said


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def _card(path: Path) -> dict[str, Any]:
    # O_NONBLOCK: a FIFO would wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a plain file")
        text = next((text for name, text in _texts(file) if name == "runner"), None)
    if text is None:
        raise ValueError("it has no runner metadata: made by another program, or with --no-metadata")
    card = json.loads(text, parse_constant=_no_constant)
    if not isinstance(card, dict):
        raise ValueError("its metadata are not an object")
    if type(card.get("schema")) is not int or card["schema"] != SCHEMA:
        raise ValueError(f"its metadata have schema {shown(str(card.get('schema')))}, this version reads {SCHEMA}")
    return card


def _texts(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """The uncompressed texts of a PNG by name; pixels are stepped over, not decoded."""
    if file.read(8) != SIGNATURE:
        raise ValueError("it is not a PNG")
    for _ in range(CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length = struct.unpack(">I", head[:4])[0]
        if head[4:] not in (b"tEXt", b"iTXt"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if length > TEXT_BYTES:
            raise ValueError(f"it has a text of {length:,} bytes; the limit is {TEXT_BYTES:,}")
        data, check = file.read(length), file.read(4)
        if struct.pack(">I", zlib.crc32(head[4:] + data)) != check:
            raise ValueError("it is damaged: a text does not have its checksum")
        name, _, rest = data.partition(b"\0")
        if head[4:] == b"tEXt":
            yield name.decode("latin-1"), rest.decode("latin-1")
        elif rest[:1] == b"\0":
            yield name.decode("latin-1"), rest[2:].split(b"\0", 2)[-1].decode()


def _text(card: Mapping[str, Any], name: str) -> str:
    value = card[name]
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():
        raise ValueError(f"{name} in its metadata is no plain text")
    return value


def _dtype(card: Mapping[str, Any]) -> dict[str, str]:
    value = card["dtype"]
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise ValueError("dtype in its metadata is not a name per component")
    return value


def _loras(card: Mapping[str, Any]) -> tuple[LoraRequest, ...]:
    value = card.get("loras", [])
    if not isinstance(value, list):
        raise ValueError("loras in its metadata are no list")
    return tuple(_lora(each) for each in value)


def _lora(value: Any) -> LoraRequest:
    match value:
        case {"source": str(), "sha256": str(digest), "scale": float(scale)} if re.fullmatch("[0-9a-f]{64}", digest):
            return LoraRequest(_text(value, "source"), scale, digest)
    raise ValueError("a LoRA in its metadata lacks its source, sha256 or scale")


def _no_constant(name: str) -> Any:
    raise ValueError(f"its metadata hold {name}, which is no JSON")
