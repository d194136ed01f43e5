"""The header of a safetensors file, written and read strictly: what the format allows is not all that we accept."""

import json
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from runner.artifacts.manifest import MAX_OBJECT_BYTES, TORCH_NAMES, TensorSpec
from stages.strict_json import strict_json

METADATA = "__metadata__"
FIELD = "stagerun"
LONGEST = 2**20
_NAME = re.compile(r"[a-z0-9_.]{1,64}")
DTYPES: Mapping[str, torch.dtype] = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """The tensors of a file, where each begins in it, and its one metadata text."""

    tensors: Mapping[str, TensorSpec]
    begins: Mapping[str, int]
    metadata: str


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
    text = data[8 : 8 + length]
    if not text.startswith(b"{"):
        raise ValueError("a header that does not start with a brace")
    entries = strict_json(text)
    assert isinstance(entries, dict), "it starts with a brace"
    metadata = entries.pop(METADATA, None)
    if not isinstance(metadata, dict) or metadata.keys() != {FIELD} or not isinstance(metadata[FIELD], str):
        raise ValueError("no metadata of ours")
    end, begins = 8 + length, {}
    for (begin, stop), name in sorted((_span(name, entry), name) for name, entry in entries.items()):
        if begin + 8 + length != end:
            raise ValueError(f"a hole or an overlap before {name}")
        begins[name], end = end, stop + 8 + length
    if end != len(data):
        raise ValueError(f"{len(data):,} bytes where its header places {end:,}")
    specs = {name: TensorSpec(dtype=entries[name]["dtype"], shape=entries[name]["shape"]) for name in begins}
    return Header(specs, begins, metadata[FIELD])


def is_name(text: str) -> bool:
    """Whether a tensor may be called so."""
    return _NAME.fullmatch(text) is not None


def _span(name: str, entry: object) -> tuple[int, int]:
    if not is_name(name):
        raise ValueError(f"a tensor called {name[:80]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} without dtype, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} of an unknown dtype")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} with a bad shape or bad offsets")
    if len(shape) > 16 or math.prod(max(side, 1) for side in shape) > MAX_OBJECT_BYTES:
        raise ValueError(f"{name} of shape {shape}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size or offsets[0] % DTYPES[dtype].itemsize:
        raise ValueError(f"{name} of {size:,} bytes at {offsets[0]:,} to {offsets[1]:,}")
    return offsets[0], offsets[1]


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
