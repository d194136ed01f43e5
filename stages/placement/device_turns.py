"""Turns on cards: a lane has a card for all the blocks that it runs there in a row.

Without them the cards share their time fairly among lanes, kernel by kernel, so that lanes that began together stay
side by side: all on the first card, then all on the second, and nothing is gained.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class DeviceTurns:
    """Who may work on which card: one thread at a time, in the order in which they asked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[int]] = {}

    def take(self, card: str) -> None:
        """Wait for the card."""
        me = threading.get_ident()
        with self._changed:
            queue = self._waiting.setdefault(card, deque())
            queue.append(me)
            self._changed.wait_for(lambda: queue[0] == me)

    def asked(self, card: str) -> int:
        """How many threads have the card or wait for it."""
        with self._changed:
            return len(self._waiting.get(card, ()))

    def give(self, card: str) -> None:
        """Let the next one have the card, once what this thread ordered of it is done, or the card fails."""
        try:
            # Orders run ahead of the card by far: without this, one lane's whole step would be before the next lane's.
            torch.accelerator.current_stream(card).synchronize()
        finally:
            with self._changed:
                self._waiting[card].popleft()
                self._changed.notify_all()


class _Here(threading.local):
    turns: DeviceTurns | None = None
    card: str | None = None


_here = _Here()


@contextmanager
def taking(turns: DeviceTurns) -> Iterator[None]:
    """A block in which this thread takes turns with the others that share `turns`."""
    _here.turns = turns
    try:
        yield
    finally:
        try:
            leave()
        finally:
            _here.turns = None


def enter(device: str) -> None:
    """This thread's model goes on to work on `device`."""
    if _here.turns is not None and _here.card != device:
        leave()
        if device != "cpu":
            _here.turns.take(device)
            _here.card = device


def takes_turns(model: nn.Module, device: str) -> None:
    """Have a model that is all on one device work there in its thread's turn.

    Two threads at once would read what one of them has not made yet: models keep tensors between calls.
    """
    model.register_forward_pre_hook(lambda *call: enter(device))
    model.register_forward_hook(lambda *call: leave())


def leave() -> None:
    """This thread's model works on no card for now."""
    if _here.turns is not None and _here.card is not None:
        card, _here.card = _here.card, None
        _here.turns.give(card)
