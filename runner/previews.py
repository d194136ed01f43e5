"""Rough pictures of a denoise under way."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.artifacts import ArtifactStore

Strip = list[tuple[int, Any]]


def strips(record: Mapping[str, Any], store: "ArtifactStore") -> dict[int, Strip]:
    """The previews that the store still has: by the number of the request, steps and pixels [h, w, 3]."""
    found: dict[int, Strip] = {}
    for index, key in (record.get("previews") or {}).items():
        state = store.get(key)
        if state is not None:
            found[int(index)] = [(int(name.removeprefix("step-")), tensor.numpy())
                                 for name, tensor in state.tensors().items()]
    return found
