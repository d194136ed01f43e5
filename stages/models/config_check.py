"""Configs held against their class and against the headers of the weights, before either is believed.

A number in a config decides how many modules are made, and how large what they compute is. So each is held against
what the files have, and all modules of a skeleton together against all tensors.
"""

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal, Union, get_args, get_origin

from stages.errors import ModelError, StagerunError
from stages.models.safetensors_header import TensorEntry
from stages.out_of_memory import is_out_of_memory

# Schedulers make as many numbers as they have timesteps, CLIP reads as many tokens as its tokenizer says.
LARGEST_COUNT = 50_000
# What is said of layers that there are not is common, and that few are made in no time.
FEW = 1000
LARGEST_ID = 2**24
_LARGEST = {"diffusers": 2**16, "transformers": LARGEST_ID}
OURS = ("stages", "runner")
# Names of numbers that say how often something is made.
_COUNTED = ("layer", "block", "depth", "stage")
_MEASURED = ("channel", "dim", "size", "width", "_id", "ratio")
_WORDS: Mapping[type, str] = {type(None): "null", bool: "a bool", int: "a number", float: "a number", str: "text",
                              list: "a list", tuple: "a list", dict: "an object"}


def check_scheduler(table: Mapping[str, object], path: Path | str) -> None:
    """ModelError for a number in a scheduler's config that is more than it can be made of."""
    for name, number in _numbers(table):
        _check_count(path, name, number, LARGEST_COUNT)


def check_tokenizer(table: Mapping[str, object], path: Path, class_name: str) -> None:
    """ModelError for a number in a tokenizer's config by which too much is made: ids are large, and make nothing."""
    for name, number in _numbers(table):
        # CLIP reads as many tokens as its tokenizer says; the others are told how many.
        is_length, is_clip = name == "model_max_length", class_name.startswith("CLIPTokenizer")
        if is_clip or not is_length:
            _check_count(path, name, number, LARGEST_COUNT if is_length or "extra" in name else LARGEST_ID)


def _check_count(path: Path | str, name: str, number: int, largest: int) -> None:
    if abs(number) > largest:
        raise ModelError(f"{path}: {name} is {_shown(number)}, and more than {largest} is refused; use an untouched "
                         f"copy of the model")


def check_config(
    table: Mapping[str, object], path: Path, library: str, cls: Any, tensors: Mapping[str, TensorEntry]
) -> None:
    """ModelError for a field that is not of the kind that `cls` takes, or a number that the files do not bear out."""
    widest = max((side for entry in tensors.values() for side in entry.shape), default=0)
    for name, number in _numbers(table):
        largest = max(_LARGEST["transformers" if "position" in name else library], 4 * widest)
        if number > max(FEW, len(tensors)) and _is_counted(name):
            raise ModelError(f"{path}: {name} is {_shown(number)}, but the files have no more than {len(tensors)} "
                             f"tensors: config and weights are not of one model; use an untouched copy of it")
        if abs(number) > largest and "theta" not in name:
            raise ModelError(f"{path}: {name} is {_shown(number)}, and the widest tensor of the files {widest}: "
                             f"config and weights are not of one model; use an untouched copy of it")
    if library == "diffusers":
        _check_kinds(table, path, cls)


def _is_counted(name: str) -> bool:
    return any(word in name for word in _COUNTED) and not any(word in name for word in _MEASURED)


def _numbers(table: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Every whole number in a JSON object, with the name of the field that it stands in."""
    left: list[Iterator[tuple[str, object]]] = [iter(table.items())]
    while left:
        for name, value in left[-1]:
            if isinstance(value, dict):
                left.append(iter(value.items()))
                break
            if isinstance(value, list):
                left.append(zip(repeat(name), value, strict=False))
                break
            if isinstance(value, int) and not isinstance(value, bool):
                yield name, value
        else:
            left.pop()


def _check_kinds(table: Mapping[str, object], path: Path, cls: Any) -> None:
    for name, parameter in _parameters(cls).items():
        default = None if parameter.default is parameter.empty else parameter.default
        if name in table and not _fits(table[name], parameter.annotation, default):
            raise ModelError(f"{path}: {name} is {_shown(table[name])}, which {cls.__name__} cannot take: it has "
                             f"{_shown(default)} unless told otherwise; use an untouched copy of the model")
        if isinstance(default, int) and default >= 0 and any(number < 0 for _, number in
                                                             _numbers({name: table.get(name)})):
            raise ModelError(f"{path}: {name} is {_shown(table[name])}, and less than 0 is refused; use an untouched "
                             f"copy of the model")


def _fits(value: object, annotation: Any, default: object) -> bool:
    """Whether a JSON value is of a kind that the annotation or the default has; true where neither says any.

    A null is how many say that something is not used, whatever it is annotated with.
    """
    if value is None or (isinstance(value, int | float) and isinstance(default, int | float)):
        return True
    if type(value) is type(default) and not isinstance(value, list):
        return True
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part, None) for part in parts)
    if origin is Literal:
        return value in parts
    if annotation is inspect.Parameter.empty and default is not None:
        annotation = type(default)
    if (origin or annotation) in (list, tuple, Sequence, Collection):
        return isinstance(value, list) and _all_fit(value, parts)
    if annotation in (int, float):
        return isinstance(value, int | float)
    if annotation is None or annotation in _WORDS:
        return isinstance(value, type(None) if annotation is None else annotation)
    return True


def _all_fit(items: Sequence[object], parts: Sequence[Any]) -> bool:
    kinds = [part for part in parts if part is not Ellipsis]
    # A `tuple[int]` is how the libraries annotate one of any length.
    exact = len(kinds) < 2 or len(items) == len(kinds)
    return not kinds or (exact and all(any(_fits(item, kind, None) for kind in kinds) for item in items))


def odd_fields(table: Mapping[str, object], cls: Any) -> list[str]:
    """The fields that are zero, negative, empty or of another kind where `cls` has something else by default."""
    return [f"{name}={_shown(table[name])}" for name, parameter in _parameters(cls).items()
            if name in table and parameter.default is not parameter.empty and parameter.default is not None
            and _is_odd(table[name], parameter.default)]


def _is_odd(value: object, usual: object) -> bool:
    if _WORDS.get(type(value)) != _WORDS.get(type(usual)):
        return True
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float) and isinstance(usual, int | float):
        return value < 0 <= usual or abs(value) > 10**9 or (value == 0 < usual and isinstance(usual, int))
    if isinstance(value, list) and isinstance(usual, list | tuple):
        return not value or (bool(usual) and any(_is_odd(item, usual[0]) for item in value))
    return not value and bool(usual)


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _shown(value: object) -> str:
    return f"{value!r:.60}"


@contextmanager
def explained(what: str, next_step: str | Callable[[], str]) -> Iterator[None]:
    """What upstream raises of a model whose configs were not foreseen, as ModelError with its reason.

    Not that memory ran out: whoever runs the stage has an answer to that. Not what is raised in a file of ours either:
    that is a mistake of ours, which no other model would mend.
    """
    try:
        yield
    except BaseException as error:
        # The libraries and those below them raise anything, some of it of no class that can be imported: a panic in
        # the Rust of tokenizers is not even an Exception.
        is_upstream = isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
        if isinstance(error, StagerunError) or is_out_of_memory(error) or not is_upstream or _is_ours(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        step = next_step if isinstance(next_step, str) else next_step()
        raise ModelError(f"{what} ({reason:.200}); {step}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised in a file of this project, not in one of the libraries that it calls."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in OURS


@contextmanager
def counted(most: int, what: str) -> Iterator[None]:
    """While entered, ModelError as soon as more than `most` modules and parameters are made of a config."""
    from torch.nn.modules import module

    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ModelError(what)

    handles = [module.register_module_module_registration_hook(count),
               module.register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
