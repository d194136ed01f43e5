"""Which tiles a decoder is tried with, and the sizes of pictures for which it takes most."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from stages.placement.placement import Place
from stages.placement.tiling import TILES, Tiling

# Width and height in pixels.
Size = tuple[int, int]


def tilings(tile: int | None, whole: int, sizes: Sequence[Size]) -> Iterator[Tiling | None]:
    """What a decoder is tried with: as `tile` and `whole` ask for, or whole pictures, and then ever smaller tiles."""
    if tile is not None:
        yield Tiling(tile, whole) if tile else None
    else:
        yield None
        yield from (Tiling(side) for side in smaller_tiles(0, sizes))


def smaller_tiles(tile: int, sizes: Sequence[Size]) -> list[int]:
    """The sides of tiles that are less than these, or than the largest picture for 0."""
    longest = max((max(size) for size in sizes), default=0)
    return [side for side in TILES if side < (min(tile, longest) if tile else longest)]


def heaviest(sizes: Iterable[Size], tiling: Tiling | None) -> set[Size]:
    """The sizes of which one takes most: those of most pixels whole and in tiles, and that of the largest tile."""
    whole, cut = list[Size](), list[tuple[int, Size]]()
    for width, height in sizes:
        side = None if tiling is None else tiling.tile(width, height)
        if side is None:
            whole.append((width, height))
        else:
            cut.append((min(width, side) * min(height, side), (width, height)))
    found = {max(whole, key=pixels)} if whole else set()
    return found | ({max(cut)[1], max((size for _, size in cut), key=pixels)} if cut else set())


def by_pixels(sizes: Iterable[Size]) -> dict[int, list[Size]]:
    """Sizes by their pixels, the fewest first."""
    found: dict[int, list[Size]] = {}
    for size in sorted(sizes, key=pixels):
        found.setdefault(pixels(size), []).append(size)
    return found


def tiled(places: Mapping[str, Place], tiling: Tiling | None) -> dict[str, Place]:
    """The same places with these tiles, where a component can work in tiles."""
    return {name: replace(place, placement=place.placement.tiled(tiling)) for name, place in places.items()}


def pixels(size: Size) -> int:
    """Those of a picture."""
    return size[0] * size[1]
