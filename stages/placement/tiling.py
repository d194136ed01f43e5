"""Pictures that a VAE decodes in tiles, where its card has no room for them whole.

Neighboring tiles are blended, so they are other pictures than the whole ones."""

from dataclasses import dataclass
from typing import Any

from stages.errors import DoesNotFit

# Pixels along a side; the largest that fit are taken.
TILES = (1024, 512, 256)


@dataclass(frozen=True)
class Tiling:
    """Which pictures a VAE decodes in tiles, and in which."""

    side: int
    """Pixels along a side of a tile."""
    whole: int = 0
    """Pixels up to which a picture is decoded whole all the same."""

    def __str__(self) -> str:
        above = f" where a picture has more than {self.whole:,}" if self.whole else ""
        return f"in tiles of {self.side} pixels{above}"

    def tile(self, width: int, height: int) -> int | None:
        """The side of the tiles of a picture of this size; None where it is decoded whole."""
        return self.side if max(width, height) > self.side and width * height > self.whole else None


def set_tile(vae: Any, side: int | None) -> None:
    """Have a VAE work in tiles of `side` pixels, or whole; DoesNotFit for one whose tiles have no size to set."""
    if side is None:
        vae.use_tiling = False
    elif hasattr(vae, "tile_sample_min_height"):
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    elif hasattr(vae, "tile_latent_min_size"):
        scale = vae.tile_sample_min_size // vae.tile_latent_min_size
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale
        vae.enable_tiling()
    else:
        raise DoesNotFit(f"{type(vae).__name__} cannot decode in tiles: choose a smaller `size`")
