"""A model's blocks dealt over unequal cards, so that bytes fit and work is even."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

# Orders of the cards that are tried: all of them for up to five cards.
ORDERS = 24
# A busiest card may have this part more work than the least that is possible, so that memory is filled more evenly.
EVEN = 50


@dataclass(frozen=True)
class Blocks:
    """A model's blocks in execution order."""

    sizes: Sequence[int]
    """Bytes of each."""
    work: Sequence[int]
    """Operations of each."""

    def run(self, start: int, end: int) -> tuple[int, int]:
        """Bytes and work of the blocks from `start` up to `end`."""
        return sum(self.sizes[start:end]), sum(self.work[start:end])


def partition(blocks: Blocks, rooms: Sequence[int]) -> tuple[int, ...] | None:
    """The card of every block, for cards with `rooms` bytes each; None when they do not fit.

    A pass enters and leaves on card 0, which takes the first and the last blocks; each other card takes one run
    between them, so that a pass crosses as often as there are cards, which is the least. Of all that
    fit, the one whose busiest card has the least work, give or take a fiftieth; of those, the one whose fullest card
    is the least full.
    """
    if sum(blocks.sizes) > sum(rooms) or min(rooms) < 0:
        return None
    found = None
    for count, order in enumerate(permutations(range(1, len(rooms)))):
        cards = (0, *order)
        found = _best(blocks, [rooms[card] for card in cards])
        if found is not None or count >= ORDERS:
            break
    return None if found is None else tuple(cards[index] for index in found)


def _best(blocks: Blocks, rooms: Sequence[int]) -> tuple[int, ...] | None:
    whole = sum(blocks.work)
    if _fit(blocks, rooms, whole) is None:
        return None
    least = _least(max(blocks.work), whole, lambda most: _fit(blocks, rooms, most) is not None)
    least += least // EVEN
    fullest = _least(0, 1000, lambda part: _fit(blocks, [room * part // 1000 for room in rooms], least) is not None)
    return _fit(blocks, [room * fullest // 1000 for room in rooms], least)


def _least(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The least number that is good, of numbers of which the high ones are."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _fit(blocks: Blocks, rooms: Sequence[int], most: int) -> tuple[int, ...] | None:
    """A partition that gives no card more bytes than its room or more work than `most`."""
    count = len(blocks.sizes)
    for head in range(count, -1, -1):
        size, work = blocks.run(0, head)
        if size > rooms[0] or work > most:
            continue
        cards, at = [0] * head, head
        for card in range(1, len(rooms)):
            taken = _take(blocks, at, rooms[card], most)
            cards += [card] * (taken - at)
            at = taken
        rest, more = blocks.run(at, count)
        if size + rest <= rooms[0] and work + more <= most:
            return (*cards, *[0] * (count - at))
    return None


def _take(blocks: Blocks, start: int, room: int, most: int) -> int:
    """Where the longest run from `start` ends that fits."""
    size = work = 0
    for at in range(start, len(blocks.sizes)):
        size, work = size + blocks.sizes[at], work + blocks.work[at]
        if size > room or work > most:
            return at
    return len(blocks.sizes)
