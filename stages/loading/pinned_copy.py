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
# Bytes at a time: enough for a link to be busy, and few enough to stay in a processor's cache until they are copied.
PIECE = 4 * 2**20
# The host memory that all readers take, two pieces each.
PINNED_BYTES = READERS * 2 * PIECE


@dataclass(frozen=True)
class PendingTensor:
    """An empty tensor on a card, whose values are in a file."""

    source: StoredTensor
    """Where the values are."""
    stored: torch.dtype
    """The type that they have there."""
    target: torch.Tensor
    """The tensor that they go to."""


class PinnedBuffer:
    """Pinned host memory of one reader: while the card copies one half, the other is filled."""

    def __init__(self) -> None:
        self._halves = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copies: list[torch.Event | None] = [None, None]

    def send(self, pending: PendingTensor) -> None:
        """Read the tensor piece by piece and have it copied; ModelError for a file that ends within it."""
        flat, size = pending.target.view(-1), pending.stored.itemsize
        with pending.source.path.open("rb", buffering=0) as file:
            file.seek(pending.source.entry.start)
            for part in torch.split(flat, PIECE // size):
                piece = self._next()[:part.numel() * size]
                left = piece.numpy().data
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise ModelError(f"{pending.source.path} ends within {pending.source.name}; "
                                         f"fetch it again: {refetch_line(pending.source.path)}")
                    left = left[count:]
                part.copy_(piece.view(pending.stored), non_blocking=True)
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

    Host memory holds at most `PINNED_BYTES` of them at a time. Raises ModelError as `PinnedBuffer.send` does.
    """
    free: SimpleQueue[PinnedBuffer] = SimpleQueue()

    def send(tensor: PendingTensor) -> None:
        buffer = free.get()
        try:
            buffer.send(tensor)
        finally:
            free.put(buffer)

    pool = ThreadPoolExecutor(READERS, "reader")
    try:
        for _ in range(READERS if tensors else 0):
            free.put(PinnedBuffer())
        # As they stand in the files: so disks are fastest.
        ordered = sorted(tensors, key=lambda tensor: (tensor.source.path, tensor.source.entry.start))
        for sent in [pool.submit(send, tensor) for tensor in ordered]:
            sent.result()
        while not free.empty():
            free.get().wait()
    finally:
        pool.shutdown(cancel_futures=True)
