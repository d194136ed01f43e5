"""What a store keeps under a key, as its manifest tells it, and the names of keys and runs. No torch."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from runner.artifacts.signed_json import JSON, Damaged, canonical, read_document, write_document
from runner.job_fields import RUN
from runner.text import clean, gib

MAX_OBJECT_BYTES = 8 * 2**30
# Each dtype that safetensors knows, as torch calls it.
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_KEY = re.compile(r"[0-9a-f]{64}")


class TensorSpec(TypedDict):
    """What a stored tensor is."""

    dtype: str
    """Its type, as safetensors spells it."""
    shape: list[int]
    """Its shape."""


@dataclass(frozen=True)
class Artifact:
    """A stored state, as its manifest tells it."""

    key: str
    """The sha256 of everything that changes it."""
    stage: str
    """The stage that it is the result of."""
    object: str
    """The sha256 of its bytes."""
    bytes: int
    """How many they are."""
    tensors: Mapping[str, TensorSpec]
    """The tensors in it, by name."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """How it came to be: seconds, places, versions."""

    def __repr__(self) -> str:
        count = len(self.tensors)
        tensors = f"{count} tensor{'' if count == 1 else 's'}"
        return f"Artifact({clean(self.stage)} {self.key[:12]}, {gib(self.bytes)}, {tensors})"


def key_of(parts: Mapping[str, object]) -> str:
    """The sha256 of `parts` as canonical JSON; ValueError for NaN and infinity. 1 and 1.0 are different."""
    return hashlib.sha256(canonical(parts)).hexdigest()


def checked_key(key: str) -> str:
    """`key`, or ValueError where it is no sha256."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"an artifact key is 64 digits 0-9a-f, got {key[:80]!r}")
    return key


def is_key(text: str) -> bool:
    """Whether `text` is a sha256 in hex: a key, or the name of an object."""
    return _KEY.fullmatch(text) is not None


def checked_run(run: str) -> str:
    """`run`, or ValueError where it could not be the name of a folder."""
    if not is_run(run):
        raise ValueError(f"a run's name is 1 to 64 of A-Z a-z 0-9 . _ - with no dot or dash in front, got "
                         f"{run[:80]!r}")
    return run


def is_run(text: str) -> bool:
    """Whether `text` may name a run."""
    return RUN.fullmatch(text) is not None


def write_manifest(artifact: Artifact) -> bytes:
    """The manifest of `artifact`."""
    return write_document({name: getattr(artifact, name) for name in Artifact.__dataclass_fields__})


def read_manifest(data: bytes | bytearray, key: str) -> Artifact:
    """The artifact of `key`; Damaged where the manifest is another's or does not say what it must."""
    found = read_document(data)
    stage, digest, size = found.get("stage"), found.get("object"), found.get("bytes")
    tensors, note = found.get("tensors"), found.get("note")
    if found.get("key") != key:
        raise Damaged(f"it is the manifest of artifact {str(found.get('key'))[:12]}")
    if not isinstance(stage, str) or not isinstance(digest, str) or not is_key(digest) or type(size) is not int:
        raise Damaged("it names no stage, object or size")
    if not isinstance(tensors, dict) or not all(_is_spec(spec) for spec in tensors.values()):
        raise Damaged("it declares no tensors")
    if not isinstance(note, dict):
        raise Damaged("its note is no mapping")
    return Artifact(key, stage, digest, size, cast("dict[str, TensorSpec]", tensors), note)


def _is_spec(spec: JSON) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape"} or not isinstance(spec["shape"], list):
        return False
    known = isinstance(spec["dtype"], str) and spec["dtype"] in TORCH_NAMES
    return known and all(type(side) is int for side in spec["shape"])
