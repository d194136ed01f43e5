"""A component on its way into memory: a model of its class with every weight at its place, or none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import nn

from stages.errors import ModelError
from stages.loading.lora_merge import LoraMerger
from stages.loading.pinned_copy import PINNED_BYTES, PendingTensor, copy_to_devices
from stages.loading.readahead import reading_ahead
from stages.models.checkpoint import Component
from stages.models.format import loaded_dtype
from stages.models.safetensors_header import file_bytes
from stages.models.skeleton import empty_model, model_class
from stages.models.weights import compare, sources
from stages.placement.placement import DISK, Place, Placement, device_of
from stages.precompute.replay import precomputed


def load(component: Component, place: Place) -> nn.Module:
    """The component's model at its place; raises ModelError unless every parameter came from the files."""
    cls = precomputed(model_class(component), place.precomputed)
    with reading_ahead(component.files):
        if _is_direct(component, place.placement):
            model, missing = _read_directly(component, cls, place), list[str]()
        else:
            model, missing = _load_by_library(component, cls, place)
    _merge_loras(component, model)
    storage_devices = place.placement.storage_devices
    missing += [n for n, p in model.named_parameters() if p.is_meta and device_of(n, storage_devices) != DISK]
    if missing:
        raise ModelError(
            f"{component.name}: {len(missing)} parameters are not in the files, first {missing[0]}: "
            f"download {component.folder} again"
        )
    return model.eval()


def host_bytes_while_loading(component: Component, placement: Placement) -> int:
    """Bytes of host memory that loading takes besides those that stay there: of readers, LoRAs, pages of mapped files.

    Pages are the page cache's, so the system takes them back where memory is short.
    """
    sizes = [file_bytes(path) for path in component.files]
    if component.library != "diffusers":
        return sum(sizes)
    added = sum(file_bytes(lora.path) for lora in component.loras)
    mapped = not _is_direct(component, placement) or "cpu" in placement.storage_devices.values()
    return added + (max(sizes) if mapped else PINNED_BYTES)


def _is_direct(component: Component, placement: Placement) -> bool:
    """Whether weights are read without the library, whose way to a card is through mapped files."""
    return component.library == "diffusers" and placement.loads_directly


def _read_directly(component: Component, cls: Any, place: Place) -> nn.Module:
    """The model with every tensor read straight to its device, one file after the other."""
    model = empty_model(component, cls, place.dtype)
    found, stored = sources(component, model), model.state_dict()
    compare(component, model, found)
    there = {name: source for name, source in found.items() if name in stored and source is not None}
    devices, dtype_of = place.placement.storage_devices, loaded_dtype("diffusers", model, place.dtype)
    for name, buffer in list(model.named_buffers()):
        if name not in there and device_of(name, devices) != DISK:
            set_tensor(model, name, buffer.to(device_of(name, devices)))
    pending: list[PendingTensor] = []
    for path in component.files:
        with safe_open(path, "pt") as file:
            for name, source in there.items():
                if source.path == path:
                    window, device = file.get_tensor(source.name), device_of(name, devices)
                    data = _target(window, device, dtype_of(name, window.dtype))
                    set_tensor(model, name, data)
                    if device not in ("cpu", DISK):
                        pending.append(PendingTensor(source, window.dtype, data))
    copy_to_devices(pending)
    return model


def _target(window: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor for the values that a window on a file shows: on the host it has them, and may be the window itself."""
    if device == "cpu":
        return window.to(dtype)
    return torch.empty_like(window, dtype=dtype, device="meta" if device == DISK else device)


def _load_by_library(component: Component, cls: Any, place: Place) -> tuple[nn.Module, list[str]]:
    """The model as `from_pretrained` loads it, and the parameters that it did not find."""
    with without_bars():
        model, info = place.placement.model_class(cls).from_pretrained(
            component.folder, dtype=place.dtype, device_map=place.placement.device_map, use_safetensors=True,
            output_loading_info=True,
        )
    # accelerate's hooks send every argument of every block again, and keep what is on the host from the model.
    remove_hook_from_module(model, recurse=True)
    assert isinstance(model, nn.Module)
    return model, sorted(info["missing_keys"])


def _merge_loras(component: Component, model: nn.Module) -> None:
    """Merge the component's LoRAs into all weights that are there; others wait on the disk, or are not loaded."""
    merger = LoraMerger(component)
    for name, weight in list(model.named_parameters()):
        if name in merger and not weight.is_meta:
            set_tensor(model, name, merger.merged(name, weight))


def set_tensor(model: nn.Module, name: str, data: torch.Tensor) -> None:
    """Put a tensor in place of the parameter or buffer of this name, whose data cannot be set from another device."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    is_weight = isinstance(getattr(module, leaf), nn.Parameter)
    setattr(module, leaf, nn.Parameter(data, requires_grad=False) if is_weight else data)


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
