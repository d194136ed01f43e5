"""The safetensors files of one component: which they are, and what their headers say. No data is read."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from stages.errors import ModelError
from stages.models.files import Incomplete, head, parse_json, read_json, refetch, size_of

HEADER_CAP = 100 * 10**6
# Behind the name of a file that holds the header alone, in place of weights that are not here.
HEADER = ".header"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as a safetensors header lists it; `start` counts bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def read_header(path: Path) -> Mapping[str, Entry]:
    """The tensors of one file, or of one that holds a header alone; ModelError unless they fill the file exactly."""
    return _entries(path, size_of(path), header_text(path))


def header_text(path: Path) -> bytes:
    """The header of a safetensors file, not yet read; ModelError when the file is not as long as it says."""
    size = size_of(path)
    length = int.from_bytes(head(path, 8), "little")
    if size < 8 or length > min(HEADER_CAP, size - 8):
        raise ModelError(
            f"{path} is no safetensors file or is cut off: its header claims {length} bytes, the file has {size}; "
            f"fetch it again: {refetch(path)}"
        )
    return head(path, length, 8)


@lru_cache(maxsize=64)
def _entries(path: Path, size: int, text: bytes) -> Mapping[str, Entry]:
    """What the header `text` of a file of `size` bytes says; plans ask for the same ones again and again."""
    table = parse_json(text, path)
    table.pop("__metadata__", None)
    base = 8 + len(text)
    entries = {name: _entry(path, name, value, base) for name, value in table.items()}
    end = _end(path, entries.values(), base)
    if end != size and path.suffix != HEADER:
        what = "cut off" if end > size else "followed by foreign bytes"
        raise ModelError(
            f"{path} is {what}: {end} bytes expected, {size} found; fetch it again: {refetch(path)}"
        )
    return MappingProxyType(entries)


def file_bytes(path: Path) -> int:
    """Bytes of a safetensors file, also of one of which only the header is here."""
    if path.suffix != HEADER:
        return path.stat().st_size
    return max((entry.start + entry.bytes for entry in read_header(path).values()), default=0)


def weight_files(folder: Path, library: str, headers: Path | None = None) -> tuple[Path, ...]:
    """The safetensors files that the library will load from a component folder, in the order of their names.

    Files that are not there are represented by their headers, where there are any in the folder `headers`. Raises
    ModelError when there are only pickles or variants, or when the index names anything but files beside it.
    """
    there = {path.name for path in folder.iterdir()}
    kept = headers.glob(f"*{HEADER}") if headers is not None else ()
    alone = {path.stem: path for path in kept if path.stem not in there}
    name = entrance(folder, library, there | alone.keys())
    names = _indexed(folder / name) if name.endswith(".json") else [name]
    return tuple(alone.get(name, folder / name) for name in names)


def entrance(folder: Path, library: str, names: Collection[str]) -> str:
    """The one file that the library opens first, of those in the folder: the weights or their index."""
    single, index = f"{STEMS[library]}.safetensors", f"{STEMS[library]}.safetensors.index.json"
    # With both there, diffusers reads the index and transformers the single file.
    for name in (index, single) if library == "diffusers" else (single, index):
        if name in names:
            return name
    if bad := sorted(name for name in names if name.lower().endswith(PICKLES)):
        raise ModelError(
            f"{folder} has no safetensors weights, only {', '.join(bad[:3])}: pickle refused, it can run code; "
            f"use a model that ships safetensors"
        )
    if others := sorted(name for name in names if name.endswith(".safetensors")):
        raise ModelError(
            f"{folder} has {', '.join(others[:3])} but no {single}; only the plain variant is read: "
            f"use a model that ships it"
        )
    raise Incomplete(f"{folder} has no weights; fetch them: {refetch(folder / single)}")


def _indexed(index: Path) -> list[str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{index} has no weight_map; fetch it again: {refetch(index)}")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if name != PurePosixPath(name).name or "\\" in name or ":" in name or "\0" in name:
            raise ModelError(f"{index} names {name!r}, which is not a file beside it: refused; use an untouched copy")
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {name!r}: pickle refused, only safetensors are read; use a model that ships them"
            )
    return names


def _entry(path: Path, name: str, value: object, base: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if (
            dtype in _BITS
            and all(type(side) is int and side >= 0 for side in shape)
            and 0 <= start <= end
            and math.prod(shape) * _BITS[dtype] == (end - start) * 8
        ):
            return Entry(dtype, tuple(shape), base + start, end - start)
    raise ModelError(f"{path} describes tensor {name!r} wrongly ({value!r:.120}); fetch it again: {refetch(path)}")


def _end(path: Path, entries: Iterable[Entry], base: int) -> int:
    at = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.bytes)):
        if entry.start != at:
            raise ModelError(f"{path} has tensors that overlap or leave a gap at byte {at}; fetch it again: "
                            f"{refetch(path)}")
        at += entry.bytes
    return at
