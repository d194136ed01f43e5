"""States that somebody gives a stage in the place of those in the store, checked before anything is loaded."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from runner.artifacts import MemoryStore, Store, key_of
from runner.job import STAGES
from runner.planning.plan import Plan
from runner.request import FilledRequest
from stages.errors import InvalidInput
from stages.estimate.dry_run import dry_run, one_thread
from stages.models.weights import weigh
from stages.pipeline.stage import Stage
from stages.placement.placement import Place, Resident
from stages.state import State, check_value, to_host
from stages.wording import counted


def lent(plan: Plan, stage: str, states: Any, kept: Sequence[State | None]) -> tuple[Store, list[str], list[str]]:
    """A store of its own with `states`, their keys in it, and the keys for what the stage makes of them.

    `kept` are the states that the stage before made, as far as they are there. Raises InvalidInput for states that the
    stage cannot work on.
    """
    if stage == STAGES[0]:
        raise InvalidInput(f"{stage} is the first stage: it works on requests -> leave `states` out")
    listed = isinstance(states, Iterable) and not isinstance(states, State)
    given = list(states) if listed else [states]
    if not listed or not all(isinstance(state, State) for state in given):
        raise InvalidInput("`states` must be a list of states -> as run_stage gives them")
    if len(given) != len(plan.requests):
        states, requests = counted(len(given), "state"), counted(len(plan.requests), "request")
        raise InvalidInput(f"{states} for {requests} -> one for each")
    store, before = MemoryStore(), _before(stage)
    sources = [key_of({"lent": number}) for number in range(len(given))]
    for number, (key, state, made, request) in enumerate(zip(sources, given, kept, plan.requests, strict=True)):
        try:
            usable = _checked(plan, plan.stage(stage), state, made, request)
        except InvalidInput as error:
            raise InvalidInput(f"{stage} cannot work on state {number}: {error.text}") from error.__cause__
        store.put(key, before, usable, {})
    return store, sources, [key_of({"made of": key}) for key in sources]


def _checked(plan: Plan, stage: Stage, state: State, made: State | None, request: FilledRequest) -> State:
    """The state on the host; InvalidInput for one that the stage cannot work on, where `made` is what it usually has.
    """
    for name, value in state.values.items():
        check_value(name, value, None if made is None else made.values.get(name))
    state = State({name: to_host(value) for name, value in state.values.items()}, state.tags)
    for name, tensor in state.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{name} holds NaN or infinity -> look at what made it")
    if made is not None:
        if lacking := [name for name in made.values if name not in state.values]:
            raise InvalidInput(f"it lacks {' and '.join(lacking)} -> states[0].changed(...) keeps what is not changed")
        # Whoever makes a state by hand leaves them out, and the stage would miss values without a word.
        state = State(state.values, state.tags or made.tags)
    if made is None or _shapes(state) != _shapes(made):
        _rehearse(plan, stage, state, made, request)
    return state


def _rehearse(plan: Plan, stage: Stage, state: State, made: State | None, request: FilledRequest) -> None:
    """Go through the stage without weights; InvalidInput where the state's shapes stop it."""
    types = {name: place.dtype for name, place in plan.places_of(stage.name).items()}
    places = {name: Place(Resident("cpu"), dtype) for name, dtype in types.items()}
    weights = {component.name: weigh(component, types[component.name]) for component in stage.components}
    try:
        with one_thread():
            dry_run(stage, places, weights, state, request.inputs, {})
    except MemoryError:
        raise
    except Exception as error:  # Anything: with the state that the plan had, the stage came to its end.
        cause = error.__cause__ or error
        usual = {} if made is None else _shapes(made)
        odd = [f"{name} is {shape}, and was {usual[name]}" for name, shape in _shapes(state).items()
               if usual.get(name, shape) != shape] or [f"it is {state!r}"]
        reason = " ".join(str(cause).split()) or type(cause).__name__
        step = f"states as {_before(stage.name)} gives them" if made is None else "other numbers in the same shapes"
        raise InvalidInput(f"{'; '.join(odd)} ({reason:.200}) -> {step}") from error


def _before(stage: str) -> str:
    return STAGES[STAGES.index(stage) - 1]


def _shapes(state: State) -> dict[str, str]:
    return {name: str(list(tensor.shape)) for name, tensor in state.tensors().items()}
