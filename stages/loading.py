"""A component on its way into memory: a model of its class with every weight at its place, or none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import diffusers
import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import nn

from stages.checkpoint import Component
from stages.errors import LoadError
from stages.folding import folded
from stages.parallel import TensorParallel, divided
from stages.placement import DISK, Place, standing
from stages.readahead import reading_ahead
from stages.staging import Wanted, send
from stages.weights import compare, float32, hollow, model_class, sources


def load(component: Component, place: Place) -> nn.Module:
    """The component's model at its place; raises LoadError unless every parameter came from the files."""
    cls = model_class(component)
    cls = folded(cls, place.folded) if place.folded else cls
    with reading_ahead(component.files):
        if component.library == "diffusers" and not isinstance(place.placement, TensorParallel):
            model, missing = _read(component, cls, place), list[str]()
        else:
            model, missing = _by_library(component, cls, place)
    at_rest = place.placement.at_rest
    missing += [n for n, p in model.named_parameters() if p.is_meta and standing(n, at_rest) != DISK]
    if missing:
        raise LoadError(
            f"{component.name}: {len(missing)} parameters are not in the files, first {missing[0]}: "
            f"download {component.folder} again"
        )
    return model.eval()


def _read(component: Component, cls: Any, place: Place) -> nn.Module:
    """The model with every tensor read straight to its device; a weight that stays as it is on the host is a window
    on its file."""
    model = hollow(component, cls, place.dtype)
    found, kept = sources(component, model), float32(component, model, place.dtype)
    compare(component, model, found)
    stored, at_rest = model.state_dict(), place.placement.at_rest
    wanted: list[Wanted] = []
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in component.files}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            device, source = standing(name, at_rest), found.get(name) if name in stored else None
            if source is None:
                if not tensor.is_meta and device != DISK:
                    put(model, name, tensor.to(device))
                continue
            window = files[source.path].get_tensor(source.name)
            dtype = _type(window, kept(name), place.dtype)
            if device == "cpu":
                put(model, name, window.to(dtype))
                continue
            empty = torch.empty(window.shape, dtype=dtype, device="meta" if device == DISK else device)
            put(model, name, empty)
            if device != DISK:
                wanted.append(Wanted(source, window.dtype, empty))
        send(wanted)
    return model


def _by_library(component: Component, cls: Any, place: Place) -> tuple[nn.Module, list[str]]:
    """The model as `from_pretrained` loads it, and the parameters that it did not find."""
    cls = divided(cls, place.placement) if isinstance(place.placement, TensorParallel) else cls
    with without_bars():
        model, info = cls.from_pretrained(
            component.folder, dtype=place.dtype, device_map=place.placement.device_map, use_safetensors=True,
            output_loading_info=True,
        )
    # accelerate's hooks send every argument of every block again, and keep what is on the host from the model.
    remove_hook_from_module(model, recurse=True)
    assert isinstance(model, nn.Module)
    return model, sorted(info["missing_keys"])


def put(model: nn.Module, name: str, data: torch.Tensor) -> None:
    """Put a tensor in place of the parameter or buffer of this name, whose data cannot be set from another device."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    is_weight = isinstance(getattr(module, leaf), nn.Parameter)
    setattr(module, leaf, nn.Parameter(data, requires_grad=False) if is_weight else data)


def _type(stored: torch.Tensor, is_kept: bool, dtype: torch.dtype) -> torch.dtype:
    """The type that the library gives a tensor: whole numbers and flags keep theirs."""
    if not stored.is_floating_point():
        return stored.dtype
    return torch.float32 if is_kept else dtype


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the libraries' own progress bars off: progress is told through `emit`."""
    logs = [diffusers.utils.logging, transformers.utils.logging]
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
