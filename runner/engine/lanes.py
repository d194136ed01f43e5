"""Several requests in flight over one loaded stage, so that no card waits for another.

A sharded denoiser keeps one card busy at a time. Each lane is a thread with a pipeline, a scheduler and, on each
card, a stream of its own; all share the one model, and take turns on the cards that it is dealt over.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from threading import Event, Lock
from typing import TypeVar

import torch

from stages.pipeline.stage import Loaded, forget_frames
from stages.placement.device_turns import DeviceTurns, taking

T = TypeVar("T")


def process(loaded: Loaded, lanes: int, cards: Sequence[str], items: Sequence[T], do: Callable[[Loaded, T], None],
            failed: Event) -> None:
    """Call `do` with a lane and each item, `lanes` at a time; one lane works in this thread.

    The first error sets `failed`, lets the other lanes finish or notice it, and is raised.
    """
    lanes = min(lanes, len(items))
    if lanes <= 1:
        for item in items:
            do(loaded, item)
        return
    for card in cards:
        # The weights came in another stream.
        torch.accelerator.synchronize(card)
    if cards:
        # What that stream keeps for itself is of no use to lanes.
        torch.accelerator.empty_cache()
    queue, turns = Queue(items), DeviceTurns()
    with ThreadPoolExecutor(lanes, "lane") as pool:
        futures = [pool.submit(_drain, loaded.lane(), [stream(card, lane) for card in cards], turns, queue, do, failed)
                   for lane in range(lanes)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            queue.close()
            if any(future.done() and future.exception() is not None for future in futures):
                failed.set()
    errors = [error for future in futures if (error := future.exception()) is not None]
    # Lanes that stopped because of another one's error have none of their own.
    own = [error for error in errors if isinstance(error, Exception)]
    for error in errors:
        forget_frames(error)
    if errors:
        raise (own or errors)[0]


class Queue(Iterator[T]):
    """Items handed out one at a time to several threads, until it is closed."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._lock, self._open = iter(items), Lock(), True

    def __next__(self) -> T:
        with self._lock:
            if not self._open:
                raise StopIteration
            return next(self._items)

    def close(self) -> None:
        """Hand out no more."""
        with self._lock:
            self._open = False


@cache
def stream(card: str, lane: int) -> torch.Stream:
    """The stream of a lane on a card, the same one in every stage and run.

    Libraries keep a workspace for each stream that they were ever used in.
    """
    return torch.Stream(device=card)


def _drain(loaded: Loaded, streams: Sequence[torch.Stream], turns: DeviceTurns, queue: Queue[T],
           do: Callable[[Loaded, T], None], failed: Event) -> None:
    for own in streams:
        torch.accelerator.set_stream(own)
    for item in queue:
        with taking(turns):
            do(loaded, item)
        if failed.is_set():
            return
