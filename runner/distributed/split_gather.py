"""Split and gather, as the guides on distributed inference write them, for scripts of one's own under a launcher.

    with split_between_ranks(prompts) as mine:
        pictures = [pipeline(prompt) for prompt in mine]
    pictures = gather(pictures)

accelerate's `split_between_processes` changes a dict of the caller, raises TypeError for a tuple with padding, and
leaves the copies of a padded split in what is gathered; these do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from runner.distributed.env import share
from stages.errors import InvalidInput
from stages.signatures import checked_call
from stages.wording import kind_of


@dataclass(frozen=True)
class Split:
    """The last padded split."""

    length: int
    """The length of every share."""
    own: int
    """How many items of this process's share are no copies."""


_LAST: ContextVar[Split | None] = ContextVar("last_split", default=None)


@checked_call
@contextmanager
def split_between_ranks(items: Any, apply_padding: bool = False) -> Iterator[Any]:
    """This rank's share of a list, a tuple, a tensor's rows, or a dict of such: neighbors together, the rest empty.

    With `apply_padding` every share has the same length, by copies of the last item; `gather` leaves them out. Raises
    InvalidInput for anything else and for a dict of unequal lengths.
    """
    state = PartialState()
    count = _length(items)
    mine = share(count, state.process_index, state.num_processes)
    most = len(share(count, 0, state.num_processes)) if apply_padding else len(mine)
    _LAST.set(Split(most, len(mine)) if apply_padding else None)
    yield _part(items, mine, most)


@checked_call
def gather(items: Any) -> Any:
    """What all ranks have, in their order, without the copies of a padded split: a list or tuple of any things.

    Tensors are joined along their first dimension, on the host, and a dict is gathered value by value. Every rank
    calls this, with as many items as its last split gave it, or any number where that was not padded.
    """
    if isinstance(items, dict):
        return {name: gather(value) for name, value in items.items()}
    last = _LAST.get()
    length = _length(items)
    own = items[: last.own] if last is not None and length == last.length else items
    if isinstance(own, torch.Tensor):
        return torch.cat(_gathered([own.detach().cpu()]))
    return type(items)(_gathered(list(own)))


def _gathered(items: list[Any]) -> list[Any]:
    return list(gather_object(items))


def _length(items: Any) -> int:
    if isinstance(items, dict):
        lengths = {name: _length(value) for name, value in items.items()}
        if len(set(lengths.values())) > 1:
            raise InvalidInput(f"a dict is split by its values, which must be equally long: {lengths} -> give as many "
                               f"of each")
        return next(iter(lengths.values()), 0)
    if not isinstance(items, list | tuple | torch.Tensor):
        raise InvalidInput(f"{kind_of(items)} cannot be split or gathered -> a list, a tuple, a tensor or a "
                           f"dict of such")
    return len(items)


def _part(items: Any, mine: range, length: int) -> Any:
    if isinstance(items, dict):
        return {name: _part(value, mine, length) for name, value in items.items()}
    part = items[mine.start : mine.stop]
    missing = length - len(part)
    if not missing:
        return part
    if isinstance(items, torch.Tensor):
        return torch.cat([part, items[-1:].expand(missing, *items.shape[1:])])
    return part + type(items)(items[-1:]) * missing
