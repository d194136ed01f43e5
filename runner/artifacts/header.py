"""The header of a safetensors file, written and read strictly: what the format allows is not all that we accept."""

import json
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from runner.artifacts.manifest import MAX_OBJECT_BYTES, TORCH_NAMES, TensorSpec
from stages.models.safetensors_header import TensorEntry, parse_header

METADATA = "__metadata__"
FIELD = "stagerun"
LONGEST = 2**20
_NAME = re.compile(r"[a-z0-9_.]{1,64}")
DTYPES: Mapping[str, torch.dtype] = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What the header of an artifact's file says."""

    tensors: Mapping[str, TensorSpec]
    """Its tensors, in the order of their bytes."""
    begins: Mapping[str, int]
    """Where each begins, in bytes behind the header."""
    metadata: str
    """The one text that it has besides."""


def compose(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: str
) -> tuple[bytes, dict[str, TensorSpec]]:
    """The length and header bytes for `tensors`, and the specs in the order in which their data must follow."""
    # Widest elements first, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    specs: dict[str, TensorSpec] = {}
    entries: dict[str, object] = {METADATA: {FIELD: metadata}}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        assert dtype in _CODES, f"{name} is {dtype}, which safetensors cannot hold"
        specs[name] = {"dtype": _CODES[dtype], "shape": list(shape)}
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {**specs[name], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, specs


def parse(data: bytes | bytearray | mmap.mmap) -> Header:
    """The header of `data`; ValueError where it is not exactly one that `compose` could have written."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or length > min(LONGEST, len(data) - 8) or length % 8:
        raise ValueError(f"a header of {length:,} bytes in a file of {len(data):,} (at most {LONGEST:,}, by eights)")
    try:
        header = parse_header(bytes(data[8 : 8 + length]), len(data) - 8 - length, exact=True)
    except ValueError as error:
        raise ValueError(f"its header {error}") from error
    metadata = header.metadata
    if not isinstance(metadata, dict) or metadata.keys() != {FIELD} or not isinstance(metadata[FIELD], str):
        raise ValueError("no metadata of ours")
    tensors = sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].bytes, item[0]))
    for name, entry in tensors:
        _check(name, entry)
    specs = {name: TensorSpec(dtype=entry.dtype, shape=list(entry.shape)) for name, entry in tensors}
    return Header(specs, {name: entry.start for name, entry in tensors}, metadata[FIELD])


def is_name(text: str) -> bool:
    """Whether a tensor may be called so."""
    return _NAME.fullmatch(text) is not None


def _check(name: str, entry: TensorEntry) -> None:
    """Raise ValueError for a tensor that `compose` could not have written."""
    if not is_name(name):
        raise ValueError(f"a tensor called {name[:80]!r}")
    if entry.dtype not in DTYPES:
        raise ValueError(f"{name} of an unknown dtype")
    if len(entry.shape) > 16 or math.prod(max(side, 1) for side in entry.shape) > MAX_OBJECT_BYTES:
        raise ValueError(f"{name} of shape {list(entry.shape)}")
