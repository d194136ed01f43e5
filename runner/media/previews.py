"""Rough pictures of a denoise under way: made every so many steps, written beside the picture, kept for the report."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.artifacts import Store, key_of
from runner.events import Emit
from runner.media import paths
from runner.media.image import is_preview, preview_png
from runner.request import FilledRequest
from stages.errors import InvalidInput, StoreError

if TYPE_CHECKING:
    # It needs torch, and the command line imports this module before it knows what to do.
    from runner.media.latent_rgb import Colors

SIDE = 256
MOST_STRIPS, MOST_SHOTS = 6, 12
Strip = list[tuple[int, Any]]


class Previewer:
    """An emit that passes every event on, and adds a `preview` after every `every` steps of a request and its last.

    The "pixels" of a preview are a function that gives uint8 [height, width, 3]. `colors` is asked, once, for the
    colors of latents with so many features a token.
    """

    def __init__(
        self, emit: Emit, every: int, requests: Sequence[FilledRequest], colors: "Callable[[int], Colors | None]"
    ) -> None:
        self._emit, self._every, self._requests, self._find = emit, every, requests, colors
        self._colors: Colors | None = None
        self._asked = False

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        self._emit(kind, data)
        if kind == "step" and "latents" in data and (data["step"] % self._every == 0 or data["step"] == data["steps"]):
            self._look(data)

    def _look(self, data: Mapping[str, Any]) -> None:
        from runner.media.latent_rgb import grid_of

        request = self._requests[data["request"]]
        size = request.width, request.height
        latents = (data.get("clean") or data["latents"])()
        grid = grid_of(latents, size)
        if not self._asked:
            self._asked, self._colors = True, None if grid is None else self._find(grid.rows.shape[1])
            if self._colors is None:
                self._emit("warning", {"text": NOTHING_YET})
        pixels = None if self._colors is None else self._colors.picture(latents, size)
        if pixels is not None:
            self._emit("preview", {"stage": "denoise", "request": data["request"], "step": data["step"],
                                   "steps": data["steps"], "pixels": pixels.numpy})


NOTHING_YET = ("no preview yet: what latents look like is learned from pictures of the same model in the store, and "
               "there is none; the next run will have previews")


class PreviewFiles:
    """An emit that keeps the last preview of each picture in a file beside it, until the picture is there.

    `pictures` are the paths of the pictures. A file that no run made as a preview is left as it is, and `emit` told.
    """

    def __init__(self, pictures: Sequence[Path], emit: Emit) -> None:
        self._pictures, self._emit = pictures, emit
        self._kept = frozenset(pictures)
        self._off: set[Path] = set()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "preview" and data["request"] < len(self._pictures):
            self._show(self._pictures[data["request"]], data["pixels"])
        elif kind == "picture" and is_preview(path := preview_path(Path(data["path"]))):
            with suppress(OSError):
                path.unlink()

    def _show(self, picture: Path, pixels: Callable[[], Any]) -> None:
        path = preview_path(picture)
        if path in self._kept or path in self._off:
            return
        try:
            paths.write(path, preview_png(enlarged(pixels())), overwrite=is_preview(path))
        except (InvalidInput, StoreError) as error:
            self._off.add(path)
            why = f"{path} is there already" if isinstance(error, InvalidInput) else error.text
            self._emit("warning", {"text": f"no preview beside {picture.name}: {why}"})


def preview_path(path: Path) -> Path:
    """Where the preview of the picture at `path` lies: `fox.preview.png` for `fox.png`."""
    # A letter has up to four bytes, and a name at most 255.
    stem = path.stem.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    return path.with_name(f"{stem}.preview.png")


def enlarged(pixels: Any) -> Any:
    """Pixels, uint8 [height, width, 3], smoothly enlarged to at least 256 along the longer side."""
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    factor = -(-SIDE // max(height, width))
    return np.asarray(Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.BICUBIC))


class Strips:
    """An emit that keeps the previews of the first pictures of a run, evenly thinned where there are many."""

    def __init__(self) -> None:
        self._strips: dict[int, Strip] = {}

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind != "preview" or (data["request"] not in self._strips and len(self._strips) == MOST_STRIPS):
            return
        strip = self._strips.setdefault(data["request"], [])
        strip.append((data["step"], data["pixels"]()))
        if len(strip) > MOST_SHOTS:
            # Every second one, counted from the last.
            strip[:] = strip[::-1][::2][::-1]

    def keep(self, store: Store, run: str, requests: Sequence[FilledRequest]) -> dict[str, str]:
        """Put the strips of these requests into the store; their keys by the request's position, for the run's record.
        """
        import torch

        from stages.state import State

        kept = {}
        for position, strip in self._strips.items():
            # By its index in the whole run: ranks that share a run have positions of their own.
            key = kept[str(position)] = key_of({"previews": run, "request": requests[position].index})
            store.put(key, "preview", State({f"step_{step}": torch.from_numpy(shot) for step, shot in strip}), {})
        return kept


def strips(record: Mapping[str, Any], store: Store) -> dict[int, Strip]:
    """The previews that the store still has: steps and pixels, uint8 [height, width, 3], by the request's number."""
    found: dict[int, Strip] = {}
    for index, key in (record.get("previews") or {}).items():
        state = store.get(key)
        if state is not None:
            found[int(index)] = [(int(name.removeprefix("step_")), tensor.numpy())
                                 for name, tensor in state.tensors().items()]
    return found
