"""Headers of safetensors files, parsed strictly: what the format allows is not all that we accept. No data is read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from stages.errors import ModelError
from stages.models.files import HEADER_ONLY, head, refetch_line, size_of
from stages.strict_json import strict_json

# As long as the hub's own client reads; that of a model of a hundred billion parameters has a megabyte.
LONGEST_HEADER = 25 * 10**6
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header lists it."""

    dtype: str
    """Its type as the format spells it, such as `BF16`."""
    shape: tuple[int, ...]
    """The length of each of its axes."""
    start: int
    """Where its data begin, in bytes from the beginning of the file."""
    bytes: int
    """Bytes of its data."""


@dataclass(frozen=True)
class Header:
    """What a header says."""

    tensors: Mapping[str, TensorEntry]
    """The tensors by name, in the order of the header."""
    metadata: object
    """The JSON value beside them; None where there is none."""


def parse_header(text: bytes, data_bytes: int | None = None, *, exact: bool = False) -> Header:
    """What a header says whose tensors fill the data behind it without a gap or an overlap.

    `data_bytes` is how many there are, where that is known. An `exact` header has no spaces before it, nothing but
    type, shape and place of each tensor, and every tensor at a multiple of its element's size. Raises ValueError with
    what is wrong, which goes on from the name of the file.
    """
    try:
        table = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"holds a JSON {type(table).__name__}, not an object")
    if exact and not text.startswith(b"{"):
        raise ValueError("does not start with a brace")
    metadata, base = table.pop("__metadata__", None), 8 + len(text)
    tensors = {name: _entry(name, value, base, exact) for name, value in table.items()}
    end = _end(tensors.values(), base)
    if data_bytes is not None and end != base + data_bytes:
        what = "cut off" if end > base + data_bytes else "followed by foreign bytes"
        raise ValueError(f"is {what}: {end} bytes expected, {base + data_bytes} found")
    return Header(tensors, metadata)


def _entry(name: str, value: object, base: int, exact: bool) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)], **more} if (
            dtype in _BITS
            and all(type(side) is int and side >= 0 for side in (start, end, *shape))
            and math.prod(shape) * _BITS[dtype] == (end - start) * 8
            and not (exact and (more or start * 8 % _BITS[dtype]))
        ):
            return TensorEntry(dtype, tuple(shape), base + start, end - start)
    raise ValueError(f"describes tensor {name!r:.80} wrongly ({value!r:.120})")


def _end(entries: Iterable[TensorEntry], base: int) -> int:
    at = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.bytes)):
        if entry.start != at:
            raise ValueError(f"has tensors that overlap or leave a gap at byte {at}")
        at += entry.bytes
    return at


def read_header(path: Path) -> Mapping[str, TensorEntry]:
    """The tensors of a model's file, or of one that holds a header alone; ModelError unless they fill it exactly."""
    return _tensors(path, size_of(path), header_text(path))


def header_text(path: Path) -> bytes:
    """The header of a model's file, not yet parsed; ModelError when the file is not as long as it says."""
    size = size_of(path)
    length = int.from_bytes(head(path, 8), "little")
    if size < 8 or length > min(LONGEST_HEADER, size - 8):
        raise ModelError(
            f"{path} is no safetensors file or is cut off: its header claims {length} bytes, the file has {size}; "
            f"fetch it again: {refetch_line(path)}"
        )
    return head(path, length, 8)


@lru_cache(maxsize=64)
def _tensors(path: Path, size: int, text: bytes) -> Mapping[str, TensorEntry]:
    """What the header `text` of a file of `size` bytes says; plans ask for the same ones again and again."""
    try:
        header = parse_header(text, None if path.suffix == HEADER_ONLY else size - 8 - len(text))
    except ValueError as error:
        raise ModelError(f"{path} {error}; fetch it again: {refetch_line(path)}") from error
    return MappingProxyType(dict(header.tensors))


def file_bytes(path: Path) -> int:
    """Bytes of a safetensors file, also of one of which only the header is here."""
    if path.suffix != HEADER_ONLY:
        return path.stat().st_size
    return max((entry.start + entry.bytes for entry in read_header(path).values()), default=0)
