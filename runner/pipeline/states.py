"""What stands between the stages of a pipeline: a state for each picture, to look at and to change."""

from collections.abc import Iterator, KeysView
from typing import overload

import torch

from runner.planning.plan import Plan
from stages.errors import InvalidInput
from stages.state import State, Value
from stages.wording import counted, kind_of


class States:
    """The states of pictures after a stage, in their order: `states[0]["prompt_embeds"]`.

    Of a single picture the values are also reached without its number: `states["prompt_embeds"]`. Tensors may be
    changed where they are, or be replaced: `states["prompt_embeds"] = other`.
    """

    def __init__(self, plan: Plan, stage: str, states: list[State], edited: tuple[bool, ...]) -> None:
        """`edited` says of which pictures a state before this one was changed."""
        self.plan, self.stage, self.edited = plan, stage, edited
        self._states = states

    def __repr__(self) -> str:
        return f"States after {self.stage}:\n" + "\n".join(f"  {at}: {state}" for at, state in enumerate(self._states))

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[State]:
        return iter(self._states)

    @overload
    def __getitem__(self, name: int) -> State: ...
    @overload
    def __getitem__(self, name: str) -> Value: ...
    def __getitem__(self, name: int | str) -> State | Value:
        return self._only(name)[name] if isinstance(name, str) else self._states[self._at(name)]

    def __setitem__(self, name: int | str, value: State | Value) -> None:
        if isinstance(name, str):
            at, state = 0, self._only(name).changed(**{name: _as_value(value)})
        elif isinstance(value, State):
            at, state = self._at(name), value
        else:
            raise InvalidInput(f"{kind_of(value)} is no state -> states[{name}] = "
                               f"states[{name}].changed(prompt_embeds=...)")
        self._states[at] = state

    def __contains__(self, name: object) -> bool:
        return any(name in state for state in self._states)

    def keys(self) -> KeysView[str]:
        """The names of the values of a state."""
        return self._states[0].keys()

    def _only(self, name: str) -> State:
        if len(self._states) > 1:
            raise InvalidInput(f"there {'is' if len(self._states) == 1 else 'are'} "
                               f"{counted(len(self._states), 'state')} -> states[0][{name!r}]")
        return self._states[0]

    def __delitem__(self, name: int | str) -> None:
        raise InvalidInput("there is a state for each picture, with all of its values -> encode fewer pictures")

    def _at(self, number: int) -> int:
        if not isinstance(number, int):
            raise InvalidInput(f"{kind_of(number)} is no number of a state -> states[0], or "
                               f"states[0][\"prompt_embeds\"]")
        if not -len(self._states) <= number < len(self._states):
            raise InvalidInput(f"there is no state {number} -> 0 to {len(self._states) - 1}")
        return number % len(self._states)


def same(one: Value, other: Value) -> bool:
    """Whether two values of states are equal, to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = all(getattr(one, name) == getattr(other, name) for name in ("dtype", "shape", "layout", "device"))
        return alike and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def _as_value(value: State | Value) -> Value:
    if isinstance(value, State):
        raise InvalidInput("a state is no value of a state -> states[0] = state")
    return value
