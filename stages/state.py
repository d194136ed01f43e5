"""What crosses a stage border: named values on the host, nothing on a card."""

from collections.abc import Collection, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Union

import torch

from stages.errors import InvalidInput
from stages.signatures import checked_call
from stages.wording import kind_of

Value = Union[
    torch.Tensor, str, int, float, bool, None, "list[Value]", "tuple[Value, ...]", "dict[str, Value]"
]


@dataclass(frozen=True)
class State:
    """What one stage hands over to the next."""

    values: Mapping[str, Value] = field(default_factory=dict)
    """The values by diffusers' names."""
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The names of the values that pipeline blocks collect under a tag, as `kwargs_mapping` of a `PipelineState`.

    Blocks that read "every denoiser input" find their values through it, so a hand-over that loses it goes wrong
    without an error.
    """

    def __repr__(self) -> str:
        named = (f"{ascii(name)[1:-1]} {_shape(tensor)}" for name, tensor in self.tensors().items())
        return f"State({', '.join(named)})"

    def __getitem__(self, name: str) -> Value:
        if name not in self.values:
            close = get_close_matches(str(name), self.values, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(self.values) or 'none'}"
            raise InvalidInput(f"the state has no {name!a} -> {hint}")
        return self.values[name]

    def __setitem__(self, name: str, value: Value) -> None:
        raise InvalidInput(f"a state stays as it is -> states[0] = states[0].changed({name}=...)")

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def keys(self) -> KeysView[str]:
        """The names of the values."""
        return self.values.keys()

    @checked_call
    def changed(self, **values: Value) -> "State":
        """The same state with other values for some of its names; InvalidInput for one that cannot stand there."""
        for name, value in values.items():
            check_value(name, value, self[name])
        return self.merged(State({name: to_host(value) for name, value in values.items()}))

    def only(self, names: Collection[str]) -> "State":
        """The same state with nothing but `names`."""
        tags = {tag: tuple(dict.fromkeys(n for n in tagged if n in names)) for tag, tagged in self.tags.items()}
        return State({n: v for n, v in self.values.items() if n in names}, {t: ns for t, ns in tags.items() if ns})

    def merged(self, other: "State") -> "State":
        """Both states in one; `other` wins."""
        tags = {t: tuple(dict.fromkeys((*self.tags.get(t, ()), *other.tags.get(t, ())))) for t in
                (*self.tags, *other.tags)}
        return State({**self.values, **other.values}, tags)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its path, such as `prompt_embeds` or `extra.0`."""
        return dict(_tensors("", self.values))


def check_value(name: str, value: Any, usual: Any = None) -> None:
    """Raise InvalidInput for what is no value of a state, or cannot stand where `usual` did, if that is known.

    Of tensors, the numbers may be of another type of floats, and sides of another length: whether a model takes those,
    it alone can say. But where there was one picture, there is one.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            kind = "without numbers (meta)" if value.is_meta else f"{value.dtype} {value.layout}".replace("torch.", "")
            raise InvalidInput(f"{name} is a tensor {kind} -> a dense tensor of plain numbers")
        if usual is not None and not _alike(value, usual):
            raise InvalidInput(f"{name} is {_shown(value)}, and was {_shown(usual)} -> {_like(usual)}")
        return
    if not isinstance(value, str | int | float | list | tuple | dict | None) and usual is None:
        raise InvalidInput(f"{name} is {_shown(value)} -> a tensor, text, numbers, or lists of these")
    if usual is not None and not isinstance(value, int | float if type(usual) is float else type(usual)):
        raise InvalidInput(f"{name} is {_shown(value)}, and was {_shown(usual)} -> {_like(usual)}")
    if isinstance(value, dict):
        if isinstance(usual, dict) and value.keys() != usual.keys():
            raise InvalidInput(f"{name} has the names {', '.join(map(str, value))}, and had "
                               f"{', '.join(usual)} -> the same names")
        for key, item in value.items():
            check_value(f"{name}.{key}", item, None if usual is None else usual[key])
    elif isinstance(value, list | tuple):
        if usual is not None and len(value) != len(usual):
            raise InvalidInput(f"{name} has {len(value)} items, and had {len(usual)} -> as many")
        for at, item in enumerate(value):
            check_value(f"{name}.{at}", item, None if usual is None else usual[at])


def _alike(value: torch.Tensor, usual: Any) -> bool:
    return (isinstance(usual, torch.Tensor) and _kind(value) == _kind(usual) and value.ndim == usual.ndim
            and value.numel() > 0 and (usual.shape[:1] != (1,) or value.shape[0] == 1))


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_floating_point():
        return "floats"
    return "booleans" if tensor.dtype is torch.bool else "integers"


def _like(usual: Any) -> str:
    if not isinstance(usual, torch.Tensor):
        return kind_of(usual)
    return f"a tensor of {_kind(usual)} in that shape"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {_shape(value)}"
    return kind_of(value)


def to_host(value: Any) -> Value:
    """A value of a pipeline as it crosses a border: tensors on the host, types and devices by name."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu")
    if isinstance(value, dict):
        return {str(key): to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return str(value) if isinstance(value, torch.dtype | torch.device) else value


def _tensors(path: str, value: object) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _tensors(f"{prefix}{key}", item)]
    if isinstance(value, list | tuple):
        return [found for index, item in enumerate(value) for found in _tensors(f"{prefix}{index}", item)]
    return []


def _shape(tensor: torch.Tensor) -> str:
    """Such as `float32[1, 20, 64]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
