"""What makes a refused plan fit: changed options, tried on paper one after the other until it does fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from runner.planning.cache import PlanCache
from runner.planning.options import fixes_of, options_of
from runner.planning.plan import Plan, make_plan
from runner.request import Request, read_size
from stages.errors import DoesNotFit

ROUNDS = 6


def plan_or_remedy(family: str, requests: Sequence[Request], **options: Any) -> Plan:
    """What `make_plan` gives; its DoesNotFit has the `options` with which all of the plan fits, if there are any."""
    known = PlanCache()
    try:
        return make_plan(family, requests, **options, known=known)
    except DoesNotFit as error:
        changes, last = remedy(error, family, requests, options | {"known": known})
        if last is not None and changes:
            tried = " ".join(" ".join(filter(None, change)) for change in changes.items())
            error.text = f"{error.text}\nThat is not enough, with {tried}: {last.text}"
        error.fixes = () if last is not None else fixes_of(changes)
        raise


def remedy(
    error: DoesNotFit, family: str, requests: Sequence[Request], options: Mapping[str, Any]
) -> tuple[dict[str, str], DoesNotFit | None]:
    """The changes that the error asks for, and those that are asked for then, until all of the plan fits.

    What helps one stage may not help the next, and a command that fails again is no help at all. Where nothing helps,
    the last error comes with them.
    """
    changes: dict[str, str] = {}
    for _ in range(ROUNDS):
        if not error.fixes:
            break
        changes |= options_of(error.fixes)
        sized, altered = changed(requests, options, changes)
        try:
            make_plan(family, sized, **(altered | {"weights": False}))
            return changes, None
        except DoesNotFit as another:
            error = another
    return changes, error


def changed(
    requests: Sequence[Request], options: Mapping[str, Any], changes: Mapping[str, str]
) -> tuple[Sequence[Request], dict[str, Any]]:
    """The requests and options of `make_plan` with some options of the command line changed."""
    altered = dict(options)
    for name, value in changes.items():
        option, _, stage = name.partition(" ")
        if option == "--size":
            width, height = read_size(value)
            requests = [replace(request, width=width, height=height) for request in requests]
        elif option == "--lanes":
            altered["lanes"] = int(value)
        elif option == "--dtype":
            altered["dtype"] = {"": getattr(torch, value)}
        elif option == "--place":
            altered["place"] = [wish for wish in altered["place"] if not places(wish, stage)]
        else:
            altered[option.removeprefix("--").replace("-", "_")] = value or None
    return requests, altered


def places(wish: str, stage: str) -> bool:
    """Whether a wish of --place is for the stage, or for a component of it."""
    return wish.partition("=")[0].partition(".")[0] == stage
