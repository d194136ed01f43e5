"""A state as the bytes of one safetensors file, and back: tensors as tensors, the rest as JSON, no pickle.

Everything that is no tensor is a skeleton in the file's metadata: tensors stand in it as `{"tensor": name}`, tuples
and dicts as `{"tuple": [...]}` and `{"dict": {...}}`, lists and plain values as themselves.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from runner.artifacts.atomic_files import Buffer
from runner.artifacts.header import DTYPES, LONGEST, METADATA, Header, compose, is_name, parse
from runner.artifacts.manifest import MAX_OBJECT_BYTES, TensorSpec
from runner.artifacts.signed_json import JSON, Damaged
from stages.errors import BadResult, StoreError
from stages.state import State, Value
from stages.strict_json import strict_json

SCHEMA = 1
# A tensor of so many bytes is looked through by all threads.
MANY = 2**23
# As an integer, infinity is the first of what is no number of its sign.
_INFINITY = {dtype: (integer, torch.tensor(math.inf, dtype=dtype).view(integer).item()) for dtype, integer in (
    (torch.float16, torch.int16), (torch.bfloat16, torch.int16), (torch.float32, torch.int32),
    (torch.float64, torch.int64))}


@dataclass(frozen=True)
class Packed:
    """A state as bytes, still in the tensors' own memory."""

    chunks: tuple[bytes | memoryview, ...]
    """The bytes, one part after the other."""
    bytes: int
    """How many they are."""
    tensors: Mapping[str, TensorSpec]
    """The tensors in them, by name."""


@dataclass(frozen=True)
class Unpacked:
    """A state read back from bytes."""

    key: str
    """The key that was written into them."""
    stage: str
    """The stage that was written into them."""
    state: State
    """The state."""
    tensors: Mapping[str, TensorSpec]
    """The tensors in them, by name."""


def pack(state: State, *, key: str, stage: str) -> Packed:
    """The bytes of `state`; BadResult where it holds a non-finite value, StoreError where it is too large."""
    tensors: dict[str, torch.Tensor] = {}
    values = {name: _skeleton(value, name, tensors, stage) for name, value in state.values.items()}
    body = {"schema": SCHEMA, "key": key, "stage": stage, "values": values, "tags": state.tags}
    text = json.dumps(body, allow_nan=False, ensure_ascii=False)
    header, specs = compose({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, text)
    chunks: list[bytes | memoryview] = [header, *(_raw(tensors[name]) for name in specs)]
    size = sum(memoryview(chunk).nbytes for chunk in chunks)
    if len(header) - 8 > LONGEST or size > MAX_OBJECT_BYTES:
        raise StoreError(
            f"stage {stage} gave {size:,} bytes under a header of {len(header):,}; an artifact holds at most "
            f"{MAX_OBJECT_BYTES:,} under {LONGEST:,}: ask for a shorter prompt or a smaller result"
        )
    return Packed(tuple(chunk for chunk in chunks if len(chunk)), size, specs)


def unpack(data: Buffer, *, finite: bool = True) -> Unpacked:
    """The state in `data`; Damaged where it is no artifact, BadResult where `finite` and a tensor is not.

    The tensors lie in `data` itself, which is not copied and must not be written to.
    """
    try:
        header = parse(data)
        body = _mapping(strict_json(header.metadata), {"schema", "key", "stage", "values", "tags"})
        if body["schema"] != SCHEMA:
            raise ValueError(f"its envelope is of schema {body['schema']}, this version reads {SCHEMA}")
        tensors = _tensors(data, header)
        left = dict(tensors)
        values = {name: _filled(value, left) for name, value in _mapping(body["values"]).items()}
        if left:
            raise ValueError(f"no value names its tensor {min(left)}")
        key, stage, tags = _text(body["key"]), _text(body["stage"]), _tags(body["tags"])
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its bytes are no artifact: {error}") from error
    if finite:
        for name, tensor in tensors.items():
            _check_finite(tensor, name, stage)
    return Unpacked(key, stage, State(values, tags), header.tensors)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if tensor.nbytes >= MANY:
        # The extremes carry NaN and infinity along, and need no mask as large as the tensor.
        low, high = torch.aminmax(tensor)
        return math.isfinite(low) and math.isfinite(high)
    # torch would wake all its threads for this.
    integer, infinity = _INFINITY[tensor.dtype]
    signed = tensor.detach().contiguous().view(integer).numpy()
    unsigned = signed.view(f"u{signed.dtype.itemsize}")
    return bool(signed.max() < infinity and unsigned.max() < infinity + 2 ** (8 * signed.dtype.itemsize - 1))


def _skeleton(value: Value, path: str, tensors: dict[str, torch.Tensor], stage: str) -> JSON:
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu", f"{path} is on {value.device}: only host tensors cross a stage border"
        _check_finite(value, path, stage)
        name = _name(path, tensors)
        tensors[name] = value.detach().resolve_conj().resolve_neg().contiguous()
        return {"tensor": name}
    if isinstance(value, list):
        return [_skeleton(item, f"{path}.{index}", tensors, stage) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_skeleton(item, f"{path}.{index}", tensors, stage) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), f"{path} has keys that are no text"
        return {"dict": {key: _skeleton(item, f"{path}.{key}", tensors, stage) for key, item in value.items()}}
    assert value is None or isinstance(value, str | int | float), f"{path} is a {type(value)}, no value of a state"
    if isinstance(value, float) and not math.isfinite(value):
        raise BadResult(f"stage {stage} gave {path} = {value}, which no later stage can use: nothing was stored")
    return value


def _name(path: str, tensors: Mapping[str, torch.Tensor]) -> str:
    name, count = path, len(tensors)
    while not is_name(name) or name == METADATA or name in tensors:
        name, count = f"tensor.{count}", count + 1
    return name


def _check_finite(tensor: torch.Tensor, name: str, stage: str) -> None:
    if not is_finite(tensor):
        raise BadResult(f"stage {stage}: {name} holds NaN or infinity; compute it again with `dtype=float32`")


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _tensors(data: Buffer, header: Header) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, spec in header.tensors.items():
        count, dtype = math.prod(spec["shape"]), DTYPES[spec["dtype"]]
        if count:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=header.begins[name])
        else:
            flat = torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(spec["shape"])
    return tensors


def _filled(value: object, tensors: dict[str, torch.Tensor]) -> Value:
    if isinstance(value, list):
        return [_filled(item, tensors) for item in value]
    if not isinstance(value, dict):
        return cast("str | int | float | bool | None", value)
    kind, inner = next(iter(value.items()), (None, None))
    if len(value) == 1 and kind == "tensor" and isinstance(inner, str) and inner in tensors:
        return tensors.pop(inner)
    if len(value) == 1 and kind == "tuple" and isinstance(inner, list):
        return tuple(_filled(item, tensors) for item in inner)
    if len(value) == 1 and kind == "dict" and isinstance(inner, dict):
        return {key: _filled(item, tensors) for key, item in inner.items()}
    raise ValueError(f"its skeleton has {str(value)[:80]}")


def _tags(value: object) -> dict[str, tuple[str, ...]]:
    tags: dict[str, tuple[str, ...]] = {}
    for tag, names in _mapping(value).items():
        if not isinstance(names, list):
            raise ValueError("its tags are no lists")
        tags[tag] = tuple(_text(name) for name in names)
    return tags


def _mapping(value: object, names: set[str] | None = None) -> dict[str, JSON]:
    if not isinstance(value, dict) or (names is not None and value.keys() != names):
        raise ValueError(f"its envelope is not a mapping of {sorted(names or ['names'])}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its envelope has {str(value)[:80]} in place of a text")
    return value
