"""Blocks of one kind gone through once: a model is dozens of the same, and going through one takes milliseconds."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from stages.ledger import Ledger


class Repeats:
    """Runs one block of a kind, and repeats what it cost for those that are alike: models are dozens of the same."""

    def __init__(self, ledger: Ledger, work: Counter[str]) -> None:
        self._ledger, self._work = ledger, work
        self._known: dict[Any, Cost] = {}

    def listen(self, name: str, block: nn.Module) -> None:
        """Count the operations of `block`, and run it only when there was none like it."""
        forward = block.forward
        kind = type(block), tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())

        @wraps(forward)
        def outer(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            key = kind, form, tuple(self._likeness(leaf) for leaf in leaves)
            before = self._ledger.flops
            cost = self._known.get(key)
            if cost is None:
                out = self._run(key, leaves, lambda: forward(*args, **kwargs))
            else:
                out = cost.again(self._ledger, leaves)
            self._work[name] += self._ledger.flops - before
            return out

        block.forward = outer

    def _run(self, key: Any, leaves: list[Any], forward: Callable[[], Any]) -> Any:
        ledger = self._ledger
        flops, now, peak = ledger.flops, Counter(ledger.now), ledger.peak
        ledger.peak = Counter(now)
        out = forward()
        spikes = {card: ledger.peak[card] - now[card] for card in ledger.peak}
        ledger.peak |= peak
        results, form = tree_flatten(out)
        made = {id(leaf): leaf for leaf in results if isinstance(leaf, torch.Tensor)}
        made = {key: leaf for key, leaf in made.items() if not any(leaf is old for old in leaves)}
        stores = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in made.values()}
        if sum((ledger.now - now).values()) == sum(stores.values()):
            # Otherwise the block keeps something for later, such as a cache of keys, or gives views of its inputs.
            self._known[key] = Cost(spikes, ledger.flops - flops, [_result(leaf, leaves, ledger) for leaf in results],
                                    form)
        return out

    def _likeness(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return tuple(leaf.shape), leaf.dtype, self._ledger.card_of(leaf)
        return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)


@dataclass(frozen=True)
class Cost:
    """What a block took: bytes above those at its entry by card, operations, and what its results are like."""

    spikes: Mapping[str, int]
    flops: int
    results: list[Any]
    form: Any

    def again(self, ledger: Ledger, leaves: list[Any]) -> Any:
        """Count the cost once more; the results for the inputs `leaves`."""
        for card, size in self.spikes.items():
            ledger.spike(card, size)
        ledger.flops += self.flops
        stores: dict[int, torch.Tensor] = {}
        return tree_unflatten([result.made(ledger, leaves, stores) for result in self.results], self.form)


@dataclass(frozen=True)
class Given:
    """A result that is one of the inputs, or no tensor."""

    at: int | None
    value: Any

    def made(self, ledger: Ledger, leaves: list[Any], stores: dict[int, torch.Tensor]) -> Any:
        return self.value if self.at is None else leaves[self.at]


@dataclass(frozen=True)
class Made:
    """A result that a block makes; `store` tells results apart that share their memory."""

    card: str
    store: int
    bytes: int
    view: tuple[Any, Any, int]
    dtype: torch.dtype

    def made(self, ledger: Ledger, leaves: list[Any], stores: dict[int, torch.Tensor]) -> torch.Tensor:
        if self.store not in stores:
            with ledger.on(self.card):
                stores[self.store] = torch.empty(self.bytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return stores[self.store].as_strided(*self.view)


def _result(leaf: Any, leaves: list[Any], ledger: Ledger) -> Given | Made:
    at = next((index for index, old in enumerate(leaves) if old is leaf), None)
    if at is not None or not isinstance(leaf, torch.Tensor):
        return Given(at, None if isinstance(leaf, torch.Tensor) else leaf)
    storage = leaf.untyped_storage()
    view = leaf.size(), leaf.stride(), int(leaf.storage_offset())
    return Made(ledger.card_of(leaf), storage._cdata, storage.nbytes(), view, leaf.dtype)
