"""The shapes of the families' models that ship with the package: for plans where a model itself cannot be read.

One file has what a model folder holds beside its weights, and of each file of weights the types and shapes of its
tensors. `python -m tools.shapes` makes them.
"""

import hashlib
import json
import lzma
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import huggingface_hub.constants as settings

from stages.models.files import HEADER_ONLY

HEADERS = "headers"
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


@dataclass(frozen=True)
class Shapes:
    """The shapes of one model."""

    model: str
    """Its hub id."""
    source: str
    """What they were made from, as people read it: `the headers of its files` or `its configs`."""
    commit: str | None
    """The commit of the model whose headers were read; None where none were."""
    made: str
    """The day on which they were made, and by which versions of the libraries."""
    small: Mapping[str, Any]
    """By path in the model folder, the JSON of every file that is not of weights."""
    weights: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
    """By path of a file of weights, type and shape of every tensor by name, in the order of the file."""

    def __str__(self) -> str:
        at = f"commit {self.commit}" if self.commit else "no commit"
        return f"made from {self.source} ({at}) on {self.made}"

    def packed(self) -> bytes:
        """The shapes as they are kept."""
        return lzma.compress(json.dumps(vars(self), separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME)

    @classmethod
    def unpacked(cls, content: bytes) -> "Shapes":
        """The shapes that `packed` wrote."""
        return cls(**json.loads(lzma.decompress(content)))


def file_name(model: str) -> str:
    """The name of the file with the shapes of a hub model."""
    return f"{model.replace('/', '--')}.json.xz"


def shipped(model: str) -> Shapes | None:
    """The shapes of a hub model that ship with the package; None for one that has none."""
    file = files(__package__).joinpath("shipped", file_name(model))
    return Shapes.unpacked(file.read_bytes()) if file.is_file() else None


def laid_out(shapes: Shapes) -> Path:
    """A folder like the model's, with its small files and, in `headers`, the headers alone of its weights.

    It is made once in the hub library's cache for what is no part of a model, and whole from the moment it is there.
    """
    digest = hashlib.sha256(json.dumps(vars(shapes)).encode()).hexdigest()[:12]
    folder = Path(settings.HF_ASSETS_CACHE, "stagerun", "shapes", f"{shapes.model.replace('/', '--')}-{digest}")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = Path(mkdtemp(dir=folder.parent))
    try:
        for path, content in shapes.small.items():
            _write(begun / path, json.dumps(content).encode())
        for path, tensors in shapes.weights.items():
            _write(begun / HEADERS / f"{path}{HEADER_ONLY}", _header(tensors))
        begun.chmod(0o755)
        try:
            begun.rename(folder)
        except OSError:
            # Somebody else was faster.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    return folder


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file with these tensors."""
    table, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
