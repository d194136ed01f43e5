"""Blocks of one kind gone through once: a model is dozens of the same, and going through one takes milliseconds."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from stages.estimate.memory_tracker import MemoryTracker
from stages.estimate.structure_key import structure_key

Costs = dict[Any, dict[Any, "Cost"]]


class BlockMemo:
    """Runs one block of a kind, and repeats what it cost for those that are alike: models are dozens of the same.

    Costs go to, and come from, `known`, which other rehearsals of the same component may share.
    """

    def __init__(self, ledger: MemoryTracker, work: Counter[str], known: dict[Any, "Cost"]) -> None:
        self._ledger, self._work, self._known = ledger, work, known

    def listen(self, name: str, block: nn.Module, resting: str) -> None:
        """Count the operations of `block`, which rests on a card, and run it only when there was none like it."""
        forward = block.forward
        kind = structure_key(block)

        @wraps(forward)
        def outer(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            here = self._one_card(resting, leaves)
            key = kind, form, *self._likeness(resting, leaves, here)
            before = self._ledger.flops
            cost = self._known.get(key)
            if cost is None:
                out = self._run(key, leaves, here, lambda: forward(*args, **kwargs))
            else:
                out = cost.again(self._ledger, leaves, here)
            self._work[name] += self._ledger.flops - before
            return out

        block.forward = outer

    def _run(self, key: Any, leaves: list[Any], here: str | None, forward: Callable[[], Any]) -> Any:
        ledger = self._ledger
        flops, now, peak = ledger.flops, Counter(ledger.now), ledger.peak
        ledger.peak = Counter(now)
        out = forward()
        spikes = ledger.peak - now
        ledger.peak |= peak
        results, form = tree_flatten(out)
        made = {id(leaf): leaf for leaf in results if isinstance(leaf, torch.Tensor)}
        made = {key: leaf for key, leaf in made.items() if not any(leaf is old for old in leaves)}
        stores = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in made.values()}
        touched = {*spikes, *map(ledger.card_of, made.values())}
        # A block that keeps something for later, such as a cache of keys, or gives views of its inputs, is gone
        # through each time; so is one that is all on one card and makes something on another.
        if (here is None or touched <= {here}) and sum((ledger.now - now).values()) == sum(stores.values()):
            self._known[key] = Cost(
                {None if here else card: size for card, size in spikes.items()}, ledger.flops - flops,
                [_result(leaf, leaves, ledger, here) for leaf in results], form)
        return out

    def _one_card(self, resting: str, leaves: list[Any]) -> str | None:
        """The card that a block and all its inputs are on, if it is one; its cost would be that of any other."""
        cards = {resting, *(self._ledger.card_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))}
        return cards.pop() if len(cards) == 1 else None

    def _likeness(self, resting: str, leaves: list[Any], here: str | None) -> tuple[Any, ...]:
        def alike(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return tuple(leaf.shape), leaf.dtype, None if here else self._ledger.card_of(leaf)
            return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)

        place = self._ledger.scratch.get(here, 0.0) if here else (resting, tuple(self._ledger.scratch.items()))
        return place, tuple(map(alike, leaves))


@dataclass(frozen=True)
class Cost:
    """What a block took: bytes above those at its entry by card, operations, and what its results are like.

    The card None is that of the block, whichever it is.
    """

    spikes: Mapping[str | None, int]
    flops: int
    results: list[Any]
    form: Any

    def again(self, ledger: MemoryTracker, leaves: list[Any], here: str | None) -> Any:
        """Count the cost once more, of a block that is all `here`; the results for the inputs `leaves`."""
        for card in list(ledger.now):
            ledger.spike(card, self.spikes.get(None if card == here else card, 0))
        ledger.flops += self.flops
        stores: dict[int, torch.Tensor] = {}
        return tree_unflatten([result.made(ledger, leaves, here, stores) for result in self.results], self.form)


@dataclass(frozen=True)
class Given:
    """A result that is one of the inputs, or no tensor."""

    at: int | None
    value: Any

    def made(self, ledger: MemoryTracker, leaves: list[Any], here: str | None, stores: dict[int, torch.Tensor]) -> Any:
        return self.value if self.at is None else leaves[self.at]


@dataclass(frozen=True)
class Made:
    """A result that a block makes; `store` tells results apart that share their memory."""

    card: str | None
    store: int
    bytes: int
    view: tuple[Any, Any, int]
    dtype: torch.dtype

    def made(
        self, ledger: MemoryTracker, leaves: list[Any], here: str | None, stores: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        if self.store not in stores:
            with ledger.on(self.card or here or ledger.home):
                stores[self.store] = torch.empty(self.bytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return stores[self.store].as_strided(*self.view)


def _result(leaf: Any, leaves: list[Any], ledger: MemoryTracker, here: str | None) -> Given | Made:
    at = next((index for index, old in enumerate(leaves) if old is leaf), None)
    if at is not None or not isinstance(leaf, torch.Tensor):
        return Given(at, None if isinstance(leaf, torch.Tensor) else leaf)
    storage = leaf.untyped_storage()
    view = leaf.size(), leaf.stride(), int(leaf.storage_offset())
    card = None if here else ledger.card_of(leaf)
    return Made(card, storage._cdata, storage.nbytes(), view, leaf.dtype)
