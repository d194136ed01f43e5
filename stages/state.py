"""What crosses a stage border: named values on the host, nothing on a card."""

from collections.abc import Collection, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Union

import torch

from stages.errors import InvalidInput

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
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(self.values)}"
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

    def changed(self, **values: Value) -> "State":
        """The same state with other values for some of its names."""
        for name in values:
            _ = self[name]
        return self.merged(State(values))

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
