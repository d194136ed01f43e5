"""What each component weighs, block by block: its skeleton held against the headers of its files."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from stages.errors import ModelError
from stages.models.checkpoint import Component
from stages.models.format import any_of, refuse_companions, refuse_whole_numbers
from stages.models.hub import download_line
from stages.models.safetensors_header import TensorEntry, header_text, read_header
from stages.models.skeleton import config_text, skeleton
from stages.wording import counted


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    """The file."""
    name: str
    """The name that the tensor has there."""
    entry: TensorEntry
    """What the file's header says of it."""


@dataclass(frozen=True)
class Weights:
    """What a loaded component weighs; one that its library cannot split is the one block ""."""

    component: str
    """The name of the component."""
    blocks: Mapping[str, int]
    """Bytes of each block, by module name in execution order."""
    rest: Mapping[str, int]
    """Bytes of what is in no block, by the name of the outermost module or tensor."""
    extra: tuple[str, ...] = ()
    """The names of tensors that only the files have."""

    @property
    def total(self) -> int:
        """Bytes of the whole component."""
        return sum(self.blocks.values()) + sum(self.rest.values())


def weigh(component: Component, dtype: torch.dtype, precomputed: Collection[str] = ()) -> Weights:
    """The component's bytes at `dtype`, without loading it; those of the layers named in `precomputed` do not count.

    Raises ModelError when files and config do not belong together: a tensor that is missing or has another shape.
    """
    found = _inventory(component, dtype, config_text(component), tuple(map(header_text, component.files)))
    blocks, rest = dict.fromkeys(found.blocks, 0), dict[str, int]()
    for name, size in found.sizes:
        if name.rpartition(".")[0] in precomputed:
            continue
        block = next((block for block in _outer(name) if block in blocks), None)
        if block is not None:
            blocks[block] += size
        else:
            top = name.split(".", 1)[0]
            rest[top] = rest.get(top, 0) + size
    return Weights(component.name, blocks, rest, found.extra)


@dataclass(frozen=True)
class _Inventory:
    """What a component consists of."""

    sizes: tuple[tuple[str, int], ...]
    """The name and the bytes of every tensor."""
    blocks: tuple[str, ...]
    """The names of its blocks."""
    extra: tuple[str, ...]
    """The names of tensors that only the files have."""


@lru_cache(maxsize=32)
def _inventory(component: Component, dtype: torch.dtype, config: str, headers: tuple[bytes, ...]) -> _Inventory:
    """What `weigh` finds, for as long as the files say the same."""
    model = skeleton(component, dtype)
    extra = compare(component, model, sources(component, model))
    return _Inventory(tuple(sizes(model)), tuple(_blocks(model)), extra)


def sizes(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The name and the bytes of every parameter and buffer of a skeleton; tied ones once."""
    return ((name, tensor.nbytes) for name, tensor in (*model.named_parameters(), *model.named_buffers()))


def _blocks(model: nn.Module) -> list[str]:
    """The outermost modules of classes that may not be split; [""] when the library cannot split the model."""
    classes = frozenset(getattr(model, "_no_split_modules", None) or ())
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in classes and not any(outer in found for outer in _outer(name)):
            found.append(name)
    return found or [""]


def _outer(name: str) -> Iterator[str]:
    """The modules that a name stands in: "", "a", "a.b" for "a.b.c"."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts)))


def compare(component: Component, model: nn.Module, found: Mapping[str, StoredTensor | None]) -> tuple[str, ...]:
    """The names that only the files have; ModelError for what the model has and the files lack or shape otherwise."""
    wanted = model.state_dict(keep_vars=True)
    there = {id(wanted[name]) for name in found if name in wanted}
    optional = any_of(getattr(model, "_keys_to_ignore_on_load_missing", None))
    missing = [name for name, tensor in wanted.items() if id(tensor) not in there and not optional(name)]
    wrong = [
        f"{name} is {list(shape)} and not {list(wanted[name].shape)}"
        for name, source in found.items()
        if source is not None and name in wanted and wanted[name].shape != (shape := source.entry.shape)
    ]
    for what, names in (("asks for {} that the files lack", missing),
                        ("does not fit the shape of {} in the files", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{component.folder / 'config.json'} {what.format(counted(len(names), 'tensor'))}: "
                f"{', '.join(names[:3])}{more}; config and weights are not of one model: "
                f"{download_line(component.folder.parent, (component.name,))} --force-download"
            )
    refuse_whole_numbers({source.name: source.entry.dtype for name, source in found.items()
                          if source is not None and name in wanted and wanted[name].is_floating_point()},
                         component.folder)
    ignored = any_of(getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    known = {*wanted, *(name for name, _ in model.named_buffers())}
    extra = tuple(sorted(name for name in found if name not in known and not ignored(name)))
    # What belongs to a layer that is not read, such as the other half of CLIP, is nothing beside a weight.
    layers = tuple(f"{layer}{sign}" for layer in {name.rpartition(".")[0] for name in wanted} - {""} for sign in "._")
    refuse_companions((name for name in extra if name.startswith(layers)), component.folder, unknown=True)
    return extra


def sources(component: Component, model: Any) -> Mapping[str, StoredTensor | None]:
    """Where the tensors come from, under the names that the library gives them; None where it merges several."""
    stored = {name: StoredTensor(path, name, entry)
              for path in component.files for name, entry in read_header(path).items()}
    if component.library == "diffusers":
        if len(component.files) == 1:
            model._fix_state_dict_keys_on_load(stored)
        return stored
    state = model.state_dict()
    if stored.keys() <= state.keys():
        # The rules are for files with other names, and to read them all takes as long as the rest of this.
        return stored
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    found: dict[str, StoredTensor | None] = {}
    for name, source in stored.items():
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        rule = next((rule for rule in converters if pattern in rule.source_patterns), None)
        if rule is None:
            found[new] = source
        else:
            found.update({new.replace(rule.target_patterns[0], target): None for target in rule.target_patterns})
    return found
