"""A state as the bytes of one safetensors file, and back: tensors as tensors, the rest as JSON, no pickle.

Everything that is no tensor is a skeleton in the file's metadata: tensors stand in it as `{"tensor": name}`, tuples
and dicts as `{"tuple": [...]}` and `{"dict": {...}}`, lists and plain values as themselves.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Union

import safetensors.torch
import torch

from runner.header import METADATA, Spec, compose, strict_json
from runner.header import parse as parse_header
from stages.errors import BadResult, StoreError
from stages.state import State, Value

JSON = Union[str, int, float, bool, None, "list[JSON]", "dict[str, JSON]"]
SCHEMA = 1
LARGEST = 8 * 2**30
_SAFE_NAME = re.compile(r"[a-z0-9_.]{1,64}")


class Damaged(StoreError):
    """Stored bytes that are not what was written: torn, flipped, cut, swapped or forged."""


@dataclass(frozen=True)
class Packed:
    """The bytes of a state, still in the tensors' own memory, and what they hold."""

    chunks: tuple[memoryview, ...]
    bytes: int
    tensors: Mapping[str, Spec]

    def digest(self) -> str:
        """The sha256 of the bytes, in hex."""
        total = hashlib.sha256()
        for chunk in self.chunks:
            total.update(chunk)
        return total.hexdigest()


@dataclass(frozen=True)
class Unpacked:
    """A state read back, with the key and the stage that were written into its bytes."""

    key: str
    stage: str
    state: State
    tensors: Mapping[str, Spec]


def pack(state: State, *, key: str, stage: str) -> Packed:
    """The bytes of `state`; BadResult where it holds a non-finite value, StoreError where it is too large."""
    tensors: dict[str, torch.Tensor] = {}
    values = {name: _skeleton(value, name, tensors) for name, value in state.values.items()}
    _check_finite(tensors, stage)
    try:
        text = json.dumps(
            {"schema": SCHEMA, "key": key, "stage": stage, "values": values, "tags": state.tags}, allow_nan=False
        )
    except ValueError as error:
        raise BadResult(f"stage {stage} gave a non-finite number ({error}): nothing was stored") from error
    header, ordered = compose({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, text)
    chunks = (memoryview(header), *(_raw(tensors[name]) for name in ordered))
    size = sum(chunk.nbytes for chunk in chunks)
    if size > LARGEST:
        raise StoreError(f"stage {stage} gave {size:,} bytes; an artifact holds at most {LARGEST:,}: ask for less")
    return Packed(tuple(chunk for chunk in chunks if chunk.nbytes), size, ordered)


def unpack(data: bytes, *, finite: bool = True) -> Unpacked:
    """The state in `data`; Damaged where it is no artifact, BadResult where `finite` and a tensor is not."""
    try:
        header = parse_header(data)
        envelope = strict_json(header.metadata)
        if not isinstance(envelope, dict) or envelope.get("schema") != SCHEMA:
            raise ValueError("no envelope of schema 1")
        tensors = safetensors.torch.load(data)
        if tensors.keys() != header.tensors.keys():
            raise ValueError("other tensors than its header names")
        key, stage, tags = _text(envelope["key"]), _text(envelope["stage"]), _tags(envelope["tags"])
        left = dict(tensors)
        values = {name: _filled(value, left) for name, value in _mapping(envelope["values"]).items()}
        if left:
            raise ValueError(f"tensors that no value names: {', '.join(left)}")
    except (ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        raise Damaged(f"not an artifact: {error}") from error
    if finite:
        _check_finite(tensors, stage)
    return Unpacked(key, stage, State(values, tags), header.tensors)


def _skeleton(value: Value, path: str, tensors: dict[str, torch.Tensor]) -> JSON:
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu", f"{path} is on {value.device}: only host tensors cross a stage border"
        name = path if _SAFE_NAME.fullmatch(path) and path != METADATA else f"tensor.{len(tensors)}"
        while name in tensors:
            name = f"tensor.{len(tensors)}.{len(name)}"[:64]
        tensors[name] = value.detach().resolve_conj().resolve_neg().contiguous()
        return {"tensor": name}
    if isinstance(value, list):
        return [_skeleton(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_skeleton(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), f"{path} has keys that are no text"
        return {"dict": {key: _skeleton(item, f"{path}.{key}", tensors) for key, item in value.items()}}
    assert value is None or isinstance(value, str | int | float), f"{path} is a {type(value)}, no value of a state"
    return value


def _filled(value: JSON, tensors: dict[str, torch.Tensor]) -> Value:
    if isinstance(value, list):
        return [_filled(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("a skeleton node with other than one key")
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors.pop(_text(inner))
    if kind == "tuple" and isinstance(inner, list):
        return tuple(_filled(item, tensors) for item in inner)
    if kind == "dict":
        return {key: _filled(item, tensors) for key, item in _mapping(inner).items()}
    raise ValueError(f"an unknown skeleton node {kind!r}")


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _text(value: JSON) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value


def _mapping(value: JSON) -> dict[str, JSON]:
    if not isinstance(value, dict):
        raise ValueError("values that are no mapping")
    return value


def _tags(value: JSON) -> dict[str, tuple[str, ...]]:
    tags = {}
    for tag, names in _mapping(value).items():
        if not isinstance(names, list):
            raise ValueError("tags that are no list")
        tags[tag] = tuple(_text(name) for name in names)
    return tags


def _check_finite(tensors: Mapping[str, torch.Tensor], stage: str) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise BadResult(f"stage {stage}: tensor {name} holds NaN or infinity; run it again in --dtype float32")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    # The extremes carry NaN and infinity along and need no mask as large as the tensor: 50 times faster.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)
