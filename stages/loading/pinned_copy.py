"""Weights on their way from files to a card: threads read them into pinned host memory, and the card copies them."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from stages.errors import ModelError
from stages.models.files import refetch_line
from stages.models.weights import StoredTensor

READERS = 2
# Large enough for a link to be busy, small enough to stay in a processor's cache until it is copied.
PIECE = 4 * 2**20
# The host memory that all readers take, two pieces each.
STAGED = READERS * 2 * PIECE


@dataclass(frozen=True)
class PendingTensor:
    """An empty tensor on a card, and where its values are: `stored` is their type in the file."""

    source: StoredTensor
    stored: torch.dtype
    target: torch.Tensor


class PinnedBuffer:
    """Pinned host memory of one reader: while the card copies one half, the other is filled."""

    def __init__(self) -> None:
        self._halves = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copies: list[torch.Event | None] = [None, None]

    def send(self, wanted: PendingTensor) -> None:
        """Read the tensor piece by piece and have it copied; ModelError for a file that ends within it."""
        flat, size = wanted.target.view(-1), wanted.stored.itemsize
        with wanted.source.path.open("rb", buffering=0) as file:
            file.seek(wanted.source.entry.start)
            for part in torch.split(flat, PIECE // size):
                piece = self._next()[:part.numel() * size]
                left = piece.numpy().data
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise ModelError(f"{wanted.source.path} ends within {wanted.source.name}; "
                                        f"fetch it again: {refetch_line(wanted.source.path)}")
                    left = left[count:]
                part.copy_(piece.view(wanted.stored), non_blocking=True)
                self._copies[0] = torch.accelerator.current_stream(part.device).record_event()

    def wait(self) -> None:
        """Return when all that was sent has arrived."""
        for copy in self._copies:
            if copy is not None:
                copy.synchronize()

    def _next(self) -> torch.Tensor:
        """The half that was used longer ago, once its last copy is done."""
        self._halves.reverse()
        self._copies.reverse()
        if self._copies[0] is not None:
            self._copies[0].synchronize()
        return self._halves[0]


def copy_to_devices(tensors: Collection[PendingTensor]) -> None:
    """Read every tensor from its file to its card, once, in `READERS` threads; returns when all have arrived.

    Host memory holds at most `STAGED` bytes of them at a time. Raises ModelError as `PinnedBuffer.send` does.
    """
    free: SimpleQueue[PinnedBuffer] = SimpleQueue()

    def one(wanted: PendingTensor) -> None:
        staging = free.get()
        try:
            staging.send(wanted)
        finally:
            free.put(staging)

    pool = ThreadPoolExecutor(READERS, "reader")
    try:
        for _ in range(READERS if tensors else 0):
            free.put(PinnedBuffer())
        # As they stand in the files: so disks are fastest.
        ordered = sorted(tensors, key=lambda wanted: (wanted.source.path, wanted.source.entry.start))
        for sent in [pool.submit(one, wanted) for wanted in ordered]:
            sent.result()
        while not free.empty():
            free.get().wait()
    finally:
        pool.shutdown(cancel_futures=True)
