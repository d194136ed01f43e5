"""A look into an artifact: what a stage handed over, value by value."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.events import Tolerant, clean, gib
from runner.order import default_store
from runner.request import shown
from stages.errors import StoreError

if TYPE_CHECKING:
    import torch

    from runner.artifacts import Artifact, ArtifactStore
    from stages.state import State

HEAD = ("name", "shape", "type", "min", "max", "mean", "non-finite")


def look(text: str, folder: str | None) -> None:
    """Print what the artifact `text` holds: a key, the start of one, or a path in a store's stages/ or objects/."""
    from runner.artifacts import open_store

    path = Path(text)
    root = {"stages": path.parent.parent, path.name[:2]: path.parent.parent.parent}.get(path.parent.name)
    where = Path(folder) if folder is not None else root or default_store()
    store = open_store(str(where), warn=_warn, readonly=True)
    artifact = found(store, path.name.removesuffix(".json"))
    # What is not finite is what people come to see.
    rows = (f"{line}\n" for line in lines(artifact, store.read(artifact, finite=False)))
    Tolerant(sys.stdout).write("".join(rows))


def found(store: "ArtifactStore", name: str) -> "Artifact":
    """The one artifact whose key starts with `name`, or whose object is `name`; StoreError unless there is one."""
    known = store.keys()
    keys = [key for key in known if name and key.startswith(name)]
    artifacts = [artifact for key in keys or known if (artifact := store.find(key)) is not None]
    matching = [artifact for artifact in artifacts if keys or artifact.object == name]
    if len(matching) != 1:
        count = len(matching) or "no"
        raise StoreError(f"{count} artifacts of the store match {shown(name)} -> name one in full, or its --artifacts")
    return matching[0]


def lines(artifact: "Artifact", state: "State") -> list[str]:
    """A line for the artifact, a table of its tensors, and its other values."""
    rows = [HEAD, *(row(name, tensor) for name, tensor in state.tensors().items())]
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    plain = [f"{name} = {value!r:.100}" for name, value in state.values.items() if _is_plain(value)]
    return [f"{artifact.stage} {artifact.key} ({gib(artifact.bytes)})", *table, *(clean(line) for line in plain)]


def row(name: str, tensor: "torch.Tensor") -> Sequence[str]:
    """What a tensor is: name, shape, type, least, largest and mean finite value, and how many are not finite."""
    values = tensor.double().flatten()
    finite = values[values.isfinite()]
    numbers = (finite.min(), finite.max(), finite.mean()) if finite.numel() else ()
    shape = "x".join(map(str, tensor.shape)) or "-"
    told = [f"{float(number):.6g}" for number in numbers] or ["-"] * 3
    return (clean(name), shape, str(tensor.dtype).removeprefix("torch."), *told, str(values.numel() - finite.numel()))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _warn(text: str) -> None:
    Tolerant(sys.stderr).write(f"warning: {clean(text)}\n")
