"""Pictures as PIL has them, which still say how they were made when they are saved."""

import io
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from runner.media.formats import NAMES, settings
from runner.media.image import picture_file, png
from runner.media.paths import write
from stages.errors import InvalidInput
from stages.wording import kind_of


class PictureImage(PngImageFile):
    """A picture with how it was made in its `info`: saved it says so, as a file of the command line does.

    What is made of it, such as a smaller one, is a plain image of PIL and says nothing, and neither does it say
    anything once somebody drew in it: that could not be repeated.
    """

    made: bytes | None = None
    """Its pixels as they were made."""

    def save(self, fp: str | bytes | PathLike[str] | PathLike[bytes] | IO[bytes], format: str | None = None,
             **params: Any) -> None:
        """Write the picture; see PIL for the rest."""
        name = fp if isinstance(fp, str | PathLike) else getattr(fp, "name", "")
        kind = (format or Image.registered_extensions().get(Path(str(name)).suffix.lower(), "")).upper()
        if kind in NAMES and self.tobytes() == self.made:
            params = settings(kind, json.loads(self.info["runner"]), self.info["parameters"]) | params
        super().save(fp, format, **params)


def image_of(pixels: Any, card: Mapping[str, Any] | None) -> Image.Image:
    """The picture of uint8 pixels [height, width, 3]; with a card it says how it was made."""
    if card is None:
        return Image.fromarray(pixels)
    image = PictureImage(io.BytesIO(png(pixels, card)))
    image.made = pixels.tobytes()
    return image


def save(path: str | PathLike[str], pixels: Any, card: Mapping[str, Any], *, overwrite: bool) -> Path:
    """Write a picture, as the command line does, to a path with nothing there unless it is to be overwritten.

    Raises InvalidInput where something is there, or for a format that is not written; StoreError where it cannot be.
    """
    if not isinstance(path, str | PathLike):
        raise InvalidInput(f"{kind_of(path)} is no path of a picture -> such as \"fox.png\"")
    target = Path(path)
    write(target, picture_file(target, pixels, card), overwrite=overwrite)
    return target
