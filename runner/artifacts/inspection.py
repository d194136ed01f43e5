"""A look into a stored artifact: what is in it, tensor by tensor, however it is named."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.artifacts import FolderStore, Store, atomic_files, open_store
from runner.artifacts.atomic_files import Buffer
from runner.artifacts.manifest import MAX_OBJECT_BYTES, Artifact, is_key, is_run
from runner.artifacts.signed_json import Damaged
from runner.artifacts.state_format import unpack
from runner.artifacts.store import object_path
from stages.errors import StoreError
from stages.state import State
from stages.wording import counted

SHORTEST_PREFIX = 6
_PLACE = re.compile(r"(?P<store>.+)/(stages/(?P<key>[0-9a-f]{64})\.json|objects/../(?P<object>[0-9a-f]{64}))")


@dataclass(frozen=True)
class TensorSummary:
    """What is in one tensor of a state."""

    name: str
    """Its path in the state, such as `prompt_embeds` or `extra.0`."""
    dtype: str
    """Its type, as torch calls it."""
    shape: tuple[int, ...]
    """Its shape."""
    bytes: int
    """Its bytes."""
    min: float | None
    """The least of its finite elements; None where it has none, as in `max` and `mean`."""
    max: float | None
    """The greatest of its finite elements."""
    mean: float | None
    """The mean of its finite elements."""
    nonfinite: int
    """How many of its elements are NaN or infinite."""


def describe(state: State) -> list[TensorSummary]:
    """A summary of each tensor, in the order of the state."""
    return [_summary(name, tensor) for name, tensor in state.tensors().items()]


def is_path_or_url(what: str) -> bool:
    """Whether `what` names an artifact by its path or its URL, so that no store need be named."""
    return "://" in what or os.path.lexists(what)


def open_artifact(what: str, store: Store | None = None) -> tuple[Artifact, State]:
    """The artifact that `what` names, non-finite values and all; StoreError where there is none, or it is damaged.

    `what` is the path or URL of an object or of a manifest; or, in `store`, a key or six and more of its first digits;
    or a run and a stage, such as "RUN:denoise" or "RUN:denoise:3" for its request number 3, counted from 0.
    """
    if "://" in what and (found := _PLACE.fullmatch(what)) is not None:
        remote = open_store(found["store"], readonly=True)
        if found["object"]:
            return _opened(what, found["object"], remote.fetch(object_path(found["object"]), MAX_OBJECT_BYTES))
        what, store = found["key"], remote
    elif os.path.lexists(what):
        path = Path(os.path.realpath(what))
        if not path.is_file():
            raise StoreError(f"{path} is not a plain file -> name a manifest or an object of a store")
        if path.suffix != ".json":
            return _opened(str(path), path.name, atomic_files.read(path.parent, path.name, max_bytes=MAX_OBJECT_BYTES))
        what, store = path.stem, FolderStore(path.parent.parent, readonly=True)
    if store is None:
        raise StoreError(f"there is no file {what}; name a `store` to look for a key or a run")
    run, colon, stage = what.partition(":")
    key = _key_of_run(run, stage, store) if colon and is_run(run) else _key_by_prefix(what, store)
    artifact = store.find(key)
    if artifact is None:
        raise StoreError(f"artifact {key[:12]} is not in the store: that stage was not finished")
    return artifact, store.read(artifact, finite=False)


def _opened(where: str, name: str, data: Buffer | None) -> tuple[Artifact, State]:
    if data is None:
        raise StoreError(f"there is no file {where}")
    digest = hashlib.sha256(data).hexdigest()
    if is_key(name) and digest != name:
        raise Damaged(f"{where} does not have the sha256 that names it: run its stage again")
    found = unpack(data, finite=False)
    return Artifact(found.key, found.stage, digest, len(data), found.tensors), found.state


def _key_by_prefix(prefix: str, store: Store) -> str:
    if len(prefix) < SHORTEST_PREFIX:
        raise StoreError(f"{prefix!r} is no file, and a key needs {SHORTEST_PREFIX} digits or more")
    known = store.keys()
    found = [key for key in known if key.startswith(prefix)]
    if len(found) > 1:
        start = _some([key[:16] for key in found])
        raise StoreError(f"{len(found)} keys start with {prefix}: {start}; give more digits")
    if not found:
        raise StoreError(f"no file and no key starts with {prefix!r}; the last runs are: {_some(store.runs()[-3:])}")
    return found[0]


def _key_of_run(run: str, stage: str, store: Store) -> str:
    name, _, index = stage.partition(":")
    stages = store.load_run(run).get("stages")
    stages = stages if isinstance(stages, dict) else {}
    keys = stages.get(name)
    if not isinstance(keys, list):
        raise StoreError(f"run {run} has no stage {name!r}; it has {_some(list(stages))}")
    if not (index or "0").isdecimal() or int(index or "0") >= len(keys):
        raise StoreError(f"run {run} has {counted(len(keys), 'request')}, so {name}:0 to {name}:{len(keys) - 1}, "
                         f"not {index!r}")
    key = str(keys[int(index or "0")])
    if not is_key(key):
        raise StoreError(f"the record of run {run} names {key[:80]!r} for {name}, which is no artifact key: somebody "
                         f"changed it")
    return key


def _summary(name: str, tensor: torch.Tensor) -> TensorSummary:
    flat = torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor.flatten()
    wide = flat.to(torch.float64)
    finite = wide[torch.isfinite(wide)]
    low, high, mean = (finite.min(), finite.max(), finite.mean()) if len(finite) else (None, None, None)
    return TensorSummary(
        name,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        tensor.nbytes,
        None if low is None else low.item(),
        None if high is None else high.item(),
        None if mean is None else mean.item(),
        len(wide) - len(finite),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"
