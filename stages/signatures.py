"""Calls that a function cannot take, told in a line with what there is, which Python's own errors do not say."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, ParamSpec, TypeVar

from stages.errors import InvalidInput

Given = ParamSpec("Given")
Gives = TypeVar("Gives")
Class = TypeVar("Class", bound=type)
_BY_ORDER = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class WrongCall(InvalidInput, TypeError):
    """A call with names or a number of values that the function does not have."""


def checked_call(function: Callable[Given, Gives]) -> Callable[Given, Gives]:
    """The function; a call that does not have its names is a WrongCall, which says what there is."""
    takes = signature(function)

    @wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Gives:
        try:
            takes.bind(*args, **kwargs)
        except TypeError:
            raise WrongCall(_refusal(function, takes, args, kwargs)) from None
        return function(*args, **kwargs)

    return called


def checked_class(cls: Class) -> Class:
    """The class, made by calls that are checked as `checked_call` does."""
    cls.__init__ = checked_call(cls.__init__)  # type: ignore[misc]
    return cls


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """What to say of a keyword that there is not: the nearest, and all that there are."""
    names = list(known)
    close = get_close_matches(name, names, 1)
    near = f"did you mean {close[0]}=? " if close else ""
    return f"{what} takes no {name!a:.60} -> {near}it takes {', '.join(names) or 'none'}"


def takes_so_many(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many values, as far as Python knows."""
    try:
        takes = signature(function)
    except (TypeError, ValueError):  # of a function in C
        return True
    try:
        takes.bind(*range(count))
    except TypeError:
        return False
    return True


def _refusal(
    function: Callable[..., Any], takes: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    named = [name for name in takes.parameters if name not in ("self", "cls")]
    is_method = len(named) < len(takes.parameters)
    args, what = args[is_method:], _what(function)
    parameters = [takes.parameters[name] for name in named]
    known = [each.name for each in parameters if each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    ordered = [each.name for each in parameters if each.kind in _BY_ORDER]
    open_ended = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
    if not open_ended and (unknown := next((name for name in kwargs if name not in known), None)) is not None:
        return unknown_name(what, unknown, known)
    if len(args) > len(ordered):
        others = [f"{name}=" for name in known if name not in ordered]
        more = f"; by their names {', '.join(others)}" if others else ""
        return f"{what} has {len(args)} values without a name -> it takes {', '.join(ordered) or 'none'}{more}"
    if twice := [name for name in ordered[: len(args)] if name in kwargs]:
        return f"{what} has {twice[0]} twice -> leave one of them out"
    missing = [each.name for each in parameters if each.default is Parameter.empty and each.name in known
               and each.name not in kwargs and each.name not in ordered[: len(args)]]
    return f"{what} lacks {' and '.join(missing)} -> it takes {', '.join(known)}"


def _what(function: Callable[..., Any]) -> str:
    owner, _, name = function.__qualname__.rpartition(".")
    return {"__init__": owner.rpartition(".")[2], "__call__": "a call"}.get(name, f"{name}()")
