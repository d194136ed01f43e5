"""Rough pictures: learned from the store, made every N steps, written beside the picture, kept for the report."""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runner.artifacts import MemoryStore
from runner.demo import LATENT_RGB
from runner.events import json_lines, silent, tee
from runner.media.image import is_preview
from runner.media.latent_rgb import Colors, cells_of, fitted, grid_of, learned
from runner.media.previews import NOTHING_YET, Previewer, PreviewFiles, Strips, enlarged, preview_path, strips
from runner.request import Request
from stages.state import State
from tools.demo.latent_rgb import latents_and_pixels
from tools.demo.scenes import every_solo, held_out

ASKED = Request("a red circle", 64, 48, 4, None, 7, 32)


def made(size: tuple[int, int], seed: int, features: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and the pixels that a fixed linear map gives them."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(size[0] // 16 * (size[1] // 16), features, generator=draw)
    mix = torch.randn(features, 48, generator=torch.Generator().manual_seed(99)) / 30
    cells = (0.5 + rows @ mix).clamp(0, 1)
    tiles = cells.reshape(size[1] // 16, size[0] // 16, 4, 4, 3).transpose(1, 2).reshape(size[1] // 4, size[0] // 4, 3)
    pixels = tiles.repeat_interleave(4, 0).repeat_interleave(4, 1).mul(255).round().to(torch.uint8)
    return rows[None], pixels


def test_a_linear_map_is_found_again() -> None:
    colors = fitted([made((256, 128), seed) for seed in range(3)], 64)
    assert colors is not None and colors.features == 64
    latents, pixels = made((128, 256), 7)
    rough = colors.picture(latents, (128, 256))
    assert rough is not None and rough.shape == (64, 32, 3)
    expected = pixels[::4, ::4].float()
    assert (rough.float() - expected).abs().mean() < 5 < 20 < expected.std()


@pytest.mark.parametrize(
    ("shape", "features", "grid"),
    [((1, 12, 64), None, (3, 4, 64)), ((1, 16, 6, 8), None, (3, 4, 64)), ((1, 16, 1, 6, 8), None, (3, 4, 64)),
     ((1, 128, 3, 4), 128, (3, 4, 128)), ((1, 13, 64), None, None), ((2, 12, 64), None, None),
     ((1, 16, 5, 8), None, None), ((1, 16, 2, 6, 8), None, None), ((7,), None, None)],
)
def test_latents_of_every_layout_are_tokens(
    shape: tuple[int, ...], features: int | None, grid: tuple[int, int, int] | None
) -> None:
    found = grid_of(torch.zeros(shape), (64, 48), features)
    assert (None if found is None else (found.height, found.width, found.rows.shape[1])) == grid


def test_packed_and_spread_latents_are_the_same_tokens() -> None:
    spread = torch.randn(1, 16, 6, 8)
    packed = spread.reshape(1, 16, 3, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 12, 64)
    one, other = grid_of(spread, (64, 48)), grid_of(packed, (64, 48))
    assert one is not None and other is not None and torch.equal(one.rows, other.rows)


def kept(model: str, count: int) -> MemoryStore:
    """A store with the pictures of one finished run."""
    store, keys = MemoryStore(warn=print), []
    for seed in range(count):
        latents, pixels = made((256, 128), seed)
        keys.append((f"{seed:064x}", f"{seed + 1000:064x}"))
        store.put(keys[-1][0], "denoise", State({"latents": latents}), {})
        store.put(keys[-1][1], "decode", State({"pixels": pixels}), {})
    store.save_run("r1", {"model": model, "stages": {"denoise": [d for d, _ in keys], "decode": [p for _, p in keys]}})
    return store


def test_colors_are_learned_from_pictures_of_the_same_model_alone() -> None:
    store = kept("one", 2)
    assert learned(store, "another", 64) is learned(store, "one", 128) is None
    colors = learned(store, "one", 64)
    latents, pixels = made((256, 128), 5)
    assert colors is not None
    rough = colors.picture(latents, (256, 128))
    assert rough is not None and (rough.float() - pixels[::4, ::4].float()).abs().mean() < 6
    assert colors.picture(latents[:, :, :32], (256, 128)) is None


def test_the_demo_has_colors_from_the_start() -> None:
    colors, errors = Colors.read(LATENT_RGB), []
    unseen = random.Random(0).sample([scene for scene in every_solo() if held_out(scene)], 6)
    for latents, pixels in latents_and_pixels(unseen):
        rough = colors.picture(latents, (128, 128))
        grid = grid_of(latents, (128, 128))
        assert rough is not None and grid is not None and rough.shape == (32, 32, 3)
        true = cells_of(pixels, grid).reshape(8, 8, 4, 4, 3).transpose(1, 2).reshape(32, 32, 3)
        errors.append(float((rough / 255 - true).abs().mean()))
    assert max(errors) < 0.2 and sum(errors) / len(errors) < 0.13


def steps(emit: Any, count: int, request: int = 0) -> None:
    latents, _ = made((64, 48), 3)
    for step in range(1, count + 1):
        emit("step", {"stage": "denoise", "request": request, "step": step, "steps": count,
                      "latents": lambda: latents})


def flat() -> Colors:
    return Colors(torch.cat([torch.zeros(64, 48), torch.full((1, 48), 0.5)]))


def test_previews_come_every_so_many_steps_and_at_the_end() -> None:
    heard: list[tuple[str, Any]] = []
    asked: list[int] = []

    def colors(features: int) -> Colors:
        asked.append(features)
        return flat()

    steps(Previewer(lambda kind, data: heard.append((kind, data)), 3, [ASKED], colors), 7)
    assert [data["step"] for kind, data in heard if kind == "preview"] == [3, 6, 7] and asked == [64]
    shots = [data["pixels"]() for kind, data in heard if kind == "preview"]
    assert all(shot.shape == (12, 16, 3) and shot.dtype == np.uint8 and (shot == 128).all() for shot in shots)
    assert len([kind for kind, _ in heard if kind == "step"]) == 7


def test_a_model_without_pictures_yet_says_so_once() -> None:
    heard: list[tuple[str, Any]] = []
    steps(Previewer(lambda kind, data: heard.append((kind, data)), 1, [ASKED], lambda features: None), 3)
    assert [data["text"] for kind, data in heard if kind == "warning"] == [NOTHING_YET]
    assert "preview" not in [kind for kind, _ in heard]


def test_a_preview_lies_beside_its_picture_until_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    files, log = PreviewFiles([path], silent), (tmp_path / "log").open("w")
    steps(Previewer(tee(files, json_lines(log)), 2, [ASKED], lambda features: flat()), 4)
    log.close()
    assert [file.name for file in tmp_path.glob("*.png")] == ["fox.preview.png"]
    assert Image.open(preview_path(path)).size == (256, 192)
    assert "pixels" not in (tmp_path / "log").read_text()
    files("picture", {"path": str(path), "index": 0, "seed": 7})
    files("picture", {"path": str(path), "index": 0, "seed": 7})
    assert not list(tmp_path.glob("*.png"))


def untouched(path: Path) -> tuple[int, ...]:
    """What changes of a file when it is written or replaced, and not when it is read."""
    kept = os.lstat(path)
    return kept.st_ino, kept.st_mode, kept.st_size, kept.st_mtime_ns, kept.st_ctime_ns


@pytest.mark.parametrize("theirs", ["picture", "text", "link", "folder"])
def test_a_file_of_the_user_s_that_has_the_preview_s_name_is_left_as_it_is(tmp_path: Path, theirs: str) -> None:
    path, heard = tmp_path / "fox.png", list[Any]()
    there = preview_path(path)
    match theirs:
        case "picture":
            Image.new("RGB", (4, 4)).save(there)
        case "text":
            there.write_text("mine")
        case "link":
            there.symlink_to(tmp_path / "elsewhere.png")
        case "folder":
            there.mkdir()
    before = untouched(there)
    files = PreviewFiles([path], lambda kind, data: heard.append((kind, data["text"])))
    steps(Previewer(files, 2, [ASKED], lambda features: flat()), 6)
    files("picture", {"path": str(path), "index": 0, "seed": 7})
    assert untouched(there) == before and [file.name for file in tmp_path.iterdir()] == ["fox.preview.png"]
    assert heard == [("warning", f"no preview beside fox.png: {there} is there already")]


def test_the_preview_of_a_killed_run_is_replaced_and_goes_with_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    for files in (PreviewFiles([path], silent), PreviewFiles([path], silent)):
        steps(Previewer(files, 2, [ASKED], lambda features: flat()), 2)
        assert is_preview(preview_path(path))
    PreviewFiles([path], silent)("picture", {"path": str(path), "index": 0, "seed": 7})
    assert not list(tmp_path.iterdir())


def test_a_preview_never_takes_the_name_of_another_picture_of_the_run(tmp_path: Path) -> None:
    pictures = [tmp_path / "fox.png", tmp_path / "fox.preview.png"]
    steps(Previewer(PreviewFiles(pictures, silent), 2, [ASKED], lambda features: flat()), 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stem", ["x" * 250, "\u72d0" * 80, "\U0001f98a" * 60])
def test_the_preview_of_a_long_name_has_one_that_file_systems_take(tmp_path: Path, stem: str) -> None:
    steps(Previewer(PreviewFiles([tmp_path / f"{stem}.png"], silent), 2, [ASKED], lambda features: flat()), 4)
    assert [is_preview(file) for file in tmp_path.iterdir()] == [True]


def test_a_preview_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "closed").touch()
    heard = list[Any]()
    files = PreviewFiles([tmp_path / "closed/fox.png"], lambda kind, data: heard.append(kind))
    steps(Previewer(files, 1, [ASKED], lambda features: flat()), 4)
    assert heard == ["warning"]


def test_strips_are_bounded_and_end_with_the_last_step() -> None:
    heard, requests = Strips(), [replace(ASKED, index=index) for index in range(20)]
    for request in range(20):
        steps(Previewer(heard, 1, requests, lambda features: flat()), 100, request)
    store = MemoryStore(warn=print)
    found = strips({"previews": heard.keep(store, "r1", requests)}, store)
    assert sorted(found) == list(range(6)) and all(3 <= len(strip) <= 12 for strip in found.values())
    assert all(strip[-1][0] == 100 and strip[0][0] < 50 for strip in found.values())
    assert strips({"previews": {"0": 64 * "f"}}, store) == strips({}, store) == {}


def test_enlarging_keeps_the_shape() -> None:
    assert enlarged(np.zeros((32, 64, 3), np.uint8)).shape == (128, 256, 3)
    assert enlarged(np.zeros((400, 300, 3), np.uint8)).shape == (400, 300, 3)
