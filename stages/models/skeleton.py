"""A component's module without its weights: built from its config, on the meta device, in every shape and type."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import import_utils

from stages.errors import ModelError
from stages.models.checkpoint import Component
from stages.models.config_check import check_config, counted, explained, odd_fields
from stages.models.files import read_json
from stages.models.format import loaded_dtype
from stages.models.hub import download_line
from stages.models.own_caches import keep_by_itself
from stages.models.safetensors_header import read_header

_LIBRARIES: Mapping[str, Any] = {"diffusers": diffusers, "transformers": transformers}
MODULES_PER_TENSOR, MODULES_BESIDES = 8, 2000
_IMMUTABLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size, frozenset)


def _import_models() -> None:
    """Import `transformers.models` with the list that `transformers` made when it was imported, instead of another.

    It reads all of its files for that list, and later all of them again: a tenth of the time that the libraries take.
    Without effect where that is imported already, or where transformers makes its list in another way.
    """
    scan: Any = getattr(import_utils, "create_import_structure_from_path", None)
    if scan is None:
        return

    def listed(path: Any) -> Any:
        # Lists are kept by path: that of the folder, and then that of the file in it, which stands for the same.
        return scan(Path(path).parent if Path(path).name == "__init__.py" else path)

    import_utils.create_import_structure_from_path = listed
    try:
        import_module("transformers.models")
    finally:
        import_utils.create_import_structure_from_path = scan


# Before anything else imports them.
_import_models()


def skeleton(component: Component, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component's skeleton for all who only look at it: made once, and never called.

    Models keep what they computed in a call, which the next one would then not compute: a `copy_skeleton` is for that.
    """
    return _skeleton(component, dtype, config_text(component))


@lru_cache(maxsize=16)
def _skeleton(component: Component, dtype: torch.dtype, config: str) -> nn.Module:
    return new_skeleton(component, dtype)


def config_text(component: Component) -> str:
    """The component's config as its file has it: what is known of a component is known for as long as that is so."""
    return (component.folder / "config.json").read_text(errors="replace")


def new_skeleton(component: Component, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component's module on the meta device, as it is loaded at `dtype`: every shape and type, no data.

    Raises ModelError when its config does not fit.
    """
    model = _built(component, model_class(component), dtype, torch.device("meta"))
    # Some models make a buffer elsewhere; to move a model that is there already takes as long as to make it.
    if not all(buffer.is_meta for buffer in model.buffers()):
        model = model.to("meta")
    stored, loaded = model.state_dict().keys(), loaded_dtype(component.library, model, dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.is_meta, name
        if name in stored:
            tensor.data = tensor.data.to(loaded(name, tensor.dtype))
    return model.eval()


def copy_skeleton(model: nn.Module, device: Callable[[], str]) -> Any:
    """A skeleton with modules and buffers of its own, and the same parameters, that can be called.

    It says that it is on `device()`, where pipelines then put their tensors. To copy takes a third of the time that
    it takes to make one.
    """
    copies: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
    copies |= {id(buffer): buffer.clone() for buffer in model.buffers()}
    modules = list(model.modules())
    copies |= {id(module): object.__new__(type(module)) for module in modules}
    copies[id(model)] = object.__new__(_placed(type(model), device))
    for module in modules:
        copies[id(module)].__dict__.update({name: _copied(value, copies) for name, value in vars(module).items()})
    keep_by_itself(copies[id(model)])
    return copies[id(model)]


def _placed(cls: type, device: Callable[[], str]) -> type:
    """The model class, of models that say that they are on `device()`."""
    # The libraries look classes up by their full names.
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"device": property(lambda model: torch.device(device())), **named})


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """As `copy.deepcopy` has it, but fast for what modules are mostly made of."""
    if isinstance(value, _IMMUTABLE):
        return value
    if type(value) is dict:
        return {name: copies[id(part)] if id(part) in copies else _copied(part, copies)
                for name, part in value.items()}
    if isinstance(value, dict | set | list) and not value:
        return type(value)()
    return copy.deepcopy(value, copies)


def empty_model(component: Component, cls: Any, dtype: torch.dtype) -> nn.Module:
    """A diffusers model before its weights are there: parameters on the meta device, buffers as `cls` makes them."""
    return _built(component, cls, dtype, init_empty_weights(include_buffers=False))


def _built(component: Component, cls: Any, dtype: torch.dtype, where: AbstractContextManager[Any]) -> nn.Module:
    """The component's module, made anew; ModelError when its config does not fit."""
    path = component.folder / "config.json"
    table, usual = read_json(path), cls if component.library == "diffusers" else cls.config_class
    tensors = {name: entry for file in component.files for name, entry in read_header(file).items()}
    check_config(table, path, component.library, usual, tensors)
    odd = f" with {', '.join(fields)}" if (fields := odd_fields(table, usual)[:5]) else ""
    refused = f"{path}{odd} does not fit {component.class_name}"
    again = f"fetch it again: {download_line(component.folder.parent, (component.name,))}"
    # A layer has a handful of modules for each of its tensors, counted with those in it.
    most = MODULES_PER_TENSOR * len(tensors) + MODULES_BESIDES
    too_many = f"{refused} (it makes more than {most} modules, but the files have {len(tensors)} tensors); {again}"
    with explained(refused, again), counted(most, too_many), _building(dtype), where:
        if component.library == "diffusers":
            model = cls.from_config(cls.load_config(component.folder))
        else:
            model = cls(_config(cls, component, dtype))
    assert isinstance(model, nn.Module)
    return model


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


def model_class(component: Component) -> Any:
    """The library's class of the component; ModelError where the library has no model class of that name."""
    cls = class_of(component)
    if issubclass(cls, nn.Module):
        return cls
    raise _foreign(component, "model class")


def class_of(component: Component) -> type:
    """The library's class of the component, with weights or without; ModelError where it has none of that name."""
    cls = getattr(_LIBRARIES[component.library], component.class_name, None)
    if isinstance(cls, type):
        return cls
    raise _foreign(component, "class")


def odd_config(component: Component) -> tuple[str, list[str]]:
    """The name of the file that says how the component is made, and what stands out in it; "" where there is none."""
    path = component.folder / ("config.json" if component.files else "scheduler_config.json")
    if not path.is_file():
        return "", []
    cls = class_of(component)
    try:
        # The fields of a model of transformers are those of its config.
        fields = odd_fields(read_json(path), getattr(cls, "config_class", None) or cls)[:5]
    except ImportError:  # Of a class that stands in for one whose package is not here.
        fields = []
    return f"{component.name}/{path.name}", fields


def _foreign(component: Component, what: str) -> ModelError:
    return ModelError(f"{component.library} {_LIBRARIES[component.library].__version__} has no {what} "
                      f"{component.class_name}, which {component.name} needs; use a model made for this version")
