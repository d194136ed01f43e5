"""What each component weighs, block by block: its class built on the meta device, held against its files' headers."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from stages.errors import ModelError
from stages.models.checkpoint import Component
from stages.models.hub import download
from stages.models.listing import import_models
from stages.models.safetensors_header import Entry, header_text, read_header

# Before anything else imports them: a tenth of the time that the libraries take.
import_models()

LIBRARIES: Mapping[str, Any] = {"diffusers": diffusers, "transformers": transformers}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, under the name that it has there."""

    path: Path
    name: str
    entry: Entry


@dataclass(frozen=True)
class Weights:
    """Bytes of a loaded component: `blocks` by module name in execution order, `rest` by top-level name.

    A component that its library cannot split is the one block "". `extra` names tensors that only the files have.
    """

    component: str
    blocks: Mapping[str, int]
    rest: Mapping[str, int]
    extra: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of the whole component."""
        return sum(self.blocks.values()) + sum(self.rest.values())


def weigh(component: Component, dtype: torch.dtype, precomputed: Collection[str] = ()) -> Weights:
    """The component's bytes at `dtype`, without loading it; those of the layers named in `precomputed` do not count.

    Raises ModelError when files and config do not belong together: a tensor that is missing or has another shape.
    """
    found = _inventory(component, dtype, _config_text(component), tuple(map(header_text, component.files)))
    blocks, rest = dict.fromkeys(found.blocks, 0), dict[str, int]()
    for name, size in found.sizes:
        if name.rpartition(".")[0] in precomputed:
            continue
        block = next((block for block in _prefixes(name) if block in blocks), None)
        if block is not None:
            blocks[block] += size
        else:
            top = name.split(".", 1)[0]
            rest[top] = rest.get(top, 0) + size
    return Weights(component.name, blocks, rest, found.extra)


@dataclass(frozen=True)
class _Inventory:
    """Every tensor of a component with its bytes, the names of its blocks, and of tensors that only the files have."""

    sizes: tuple[tuple[str, int], ...]
    blocks: tuple[str, ...]
    extra: tuple[str, ...]


@lru_cache(maxsize=32)
def _inventory(component: Component, dtype: torch.dtype, config: str, headers: tuple[bytes, ...]) -> _Inventory:
    """What `weigh` finds, for as long as the files say the same."""
    model = skeleton(component, dtype)
    extra = compare(component, model, sources(component, model))
    return _Inventory(tuple(sizes(component, model, dtype)), tuple(_blocks(model)), extra)


def skeleton(component: Component, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component's skeleton as all have it who only look at it: made once, and never gone through.

    Models keep what they computed in a pass, which the next one would then not compute: a `copy_skeleton` is for that.
    """
    return _skeleton(component, dtype, _config_text(component))


@lru_cache(maxsize=16)
def _skeleton(component: Component, dtype: torch.dtype, config: str) -> nn.Module:
    return new_skeleton(component, dtype)


def _config_text(component: Component) -> str:
    return (component.folder / "config.json").read_text(errors="replace")


def new_skeleton(component: Component, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component's module on the meta device, as it is loaded at `dtype`: every shape and type, no data.

    Raises ModelError when its config does not fit.
    """
    model = _built(component, model_class(component), dtype, torch.device("meta"))
    # Some models make a buffer elsewhere; to move a model that is there already takes as long as to make it.
    if not all(buffer.is_meta for buffer in model.buffers()):
        model = model.to("meta")
    kept = float32(component, model, dtype)
    for name, weight in model.named_parameters():
        assert weight.is_meta, name
        if kept(name):
            weight.data = weight.data.float()
    return model.eval()


def empty_model(component: Component, cls: Any, dtype: torch.dtype) -> nn.Module:
    """A diffusers model before its weights are there: parameters on the meta device, buffers as `cls` makes them."""
    return _built(component, cls, dtype, init_empty_weights(include_buffers=False))


def _built(component: Component, cls: Any, dtype: torch.dtype, where: AbstractContextManager[Any]) -> nn.Module:
    """The component's module, made anew; ModelError when its config does not fit."""
    try:
        with _building(dtype), where:
            if component.library == "diffusers":
                model = cls.from_config(cls.load_config(component.folder))
            else:
                model = cls(_config(cls, component, dtype))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{component.folder / 'config.json'} does not fit {component.class_name} ({reason:.200}); "
                        f"fetch it again: {download(component.folder.parent, (component.name,))}") from error
    assert isinstance(model, nn.Module)
    return model


def model_class(component: Component) -> Any:
    """The library's class of the component; ModelError where the library has no model class of that name."""
    cls = class_of(component)
    if issubclass(cls, nn.Module):
        return cls
    raise _foreign(component, "model class")


def class_of(component: Component) -> type:
    """The library's class of the component, with weights or without; ModelError where it has none of that name."""
    cls = getattr(LIBRARIES[component.library], component.class_name, None)
    if isinstance(cls, type):
        return cls
    raise _foreign(component, "class")


def _foreign(component: Component, what: str) -> ModelError:
    return ModelError(f"{component.library} {LIBRARIES[component.library].__version__} has no {what} "
                     f"{component.class_name}, which {component.name} needs; use a model made for this version")


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made as they are for a run at `dtype`, and diffusers' warnings are held back."""
    default, level = torch.get_default_dtype(), diffusers_logging.get_verbosity()
    torch.set_default_dtype(dtype)
    diffusers_logging.set_verbosity_error()
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(default)
        diffusers_logging.set_verbosity(level)


def _config(cls: Any, component: Component, dtype: torch.dtype) -> Any:
    """The config with the run's type throughout, as `from_pretrained` makes it: parts are built by their own."""
    config = cls.config_class.from_pretrained(component.folder)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return config


def sizes(component: Component, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Bytes of every parameter and buffer; tied ones once."""
    kept, stored = float32(component, model, dtype), model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        size = tensor.element_size()
        if tensor.is_floating_point() and name in stored:
            if kept(name):
                size = torch.float32.itemsize
            elif component.library == "diffusers":
                # transformers keeps the type that its class gives a tensor; diffusers casts all that it reads.
                size = dtype.itemsize
        yield name, tensor.numel() * size


def float32(component: Component, model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether the library keeps a tensor in float32 when the rest is loaded at `dtype`."""
    if component.library == "diffusers":
        kept = frozenset(model._keep_in_fp32_modules or ())
        return lambda name: not kept.isdisjoint(name.split("."))
    plain = model._keep_in_fp32_modules if dtype == torch.float16 else ()
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    return _any_of([pattern.replace("*", ".*") for pattern in (*plain, *strict)])


def _blocks(model: nn.Module) -> list[str]:
    """The outermost modules of classes that may not be split; [""] when the library cannot split the model."""
    classes = frozenset(getattr(model, "_no_split_modules", None) or ())
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in classes and not any(outer in found for outer in _prefixes(name)):
            found.append(name)
    return found or [""]


def _prefixes(name: str) -> Iterator[str]:
    """ "", "a", "a.b" for "a.b.c"."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts)))


def compare(component: Component, model: nn.Module, found: Mapping[str, Stored | None]) -> tuple[str, ...]:
    """The names that only the files have; ModelError for what the model has and the files lack or shape otherwise."""
    wanted = model.state_dict(keep_vars=True)
    there = {id(wanted[name]) for name in found if name in wanted}
    optional = _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None))
    missing = [name for name, tensor in wanted.items() if id(tensor) not in there and not optional(name)]
    wrong = [
        f"{name} is {list(shape)} and not {list(wanted[name].shape)}"
        for name, source in found.items()
        if source is not None and name in wanted and wanted[name].shape != (shape := source.entry.shape)
    ]
    for what, names in (("asks for {} tensors that the files lack", missing),
                        ("does not fit the shape of {} tensors in the files", wrong)):
        if names:
            raise ModelError(
                f"{component.folder / 'config.json'} {what.format(len(names))}: {_listed(names)}; config and weights "
                f"are not of one model: {download(component.folder.parent, (component.name,))} --force-download"
            )
    ignored = _any_of(getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    known = {*wanted, *(name for name, _ in model.named_buffers())}
    return tuple(sorted(name for name in found if name not in known and not ignored(name)))


def sources(component: Component, model: Any) -> Mapping[str, Stored | None]:
    """Where the tensors come from, under the names that the library gives them; None where it merges several."""
    stored = {name: Stored(path, name, entry) for path in component.files for name, entry in read_header(path).items()}
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
    found: dict[str, Stored | None] = {}
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


def _any_of(patterns: Collection[str] | None) -> Callable[[str], bool]:
    found = re.compile("|".join(f"({pattern})" for pattern in patterns or ()))
    return lambda name: bool(patterns) and found.search(name) is not None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
