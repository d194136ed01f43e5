"""Pictures say how they were made and can be repeated from it; their names never leave their folder."""

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.media.image import card_of, parameters, png, read_card
from runner.media.paths import Naming, slug, write
from runner.request import Request, requests_for
from stages.errors import StoreError
from stages.families import FAMILIES

SIGNATURE = b"\x89PNG\r\n\x1a\n"
FACTS: dict[str, Any] = {
    "family": "flux", "model": "black-forest-labs/FLUX.1-dev", "identity": f"black-forest-labs/FLUX.1-dev@{'a1' * 20}",
    "dtype": {"transformer": "bfloat16", "vae": "float32"}, "devices": ["cuda:0", "cuda:1"],
}
TRAP = "a cat\nNegative prompt: x\nSteps: 1, Seed: 6, Size: 8x8, Model: evil"


def asked(prompt: str = "a red circle", count: int = 1) -> list[Request]:
    return requests_for(prompt, FAMILIES["flux"], size=(32, 16), seed=42, count=count)


def choose(out: str | None, requests: list[Request], *, run: str, overwrite: bool = False) -> list[Path]:
    naming = Naming(out, run=run, total=len(requests), overwrite=overwrite)
    return [naming.path(request) for request in requests]


def pixels() -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "prompt", ["a red circle", TRAP, "caf\u00e9 \u732b \U0001f600\u200d\u202e", "a\tb, c: d\n", '"{}\\']
)
def test_a_picture_says_what_made_it_whatever_the_prompt(tmp_path: Path, prompt: str) -> None:
    [request] = asked(prompt)
    path = tmp_path / "p.png"
    path.write_bytes(png(pixels(), card_of(request, FACTS)))
    said = read_card(path)
    assert said.request == request
    assert (said.family, said.model, said.dtype) == ("flux", FACTS["model"], FACTS["dtype"])
    assert said.revision == "a1" * 20
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels())
        assert image.info["parameters"] == parameters(card_of(request, FACTS))
        assert json.loads(image.info["runner"])["versions"]["diffusers"]


def test_a_picture_says_what_it_was_led_away_from(tmp_path: Path) -> None:
    [request] = requests_for("a red circle", FAMILIES["sd3"], size=(32, 16), seed=42, negative_prompt="a blue one")
    card = card_of(request, {**FACTS, "family": "sd3"})
    (tmp_path / "p.png").write_bytes(png(pixels(), card))
    assert read_card(tmp_path / "p.png").request == request
    assert parameters(card).startswith("a red circle\nNegative prompt: a blue one\nSteps: 28, ")


def test_parameters_are_what_other_programs_read() -> None:
    [request] = asked(TRAP)
    card = card_of(request, {**FACTS, "scheduler": {"name": "FlowMatchEuler", "config": {}}})
    prompt, _, last = parameters(card).rpartition("\n")
    assert prompt == TRAP
    assert last.startswith("Steps: 28, Sampler: FlowMatchEuler, CFG scale: 3.5, Seed: 42, Size: 32x16, Model: FLUX.1")
    assert ", Version: stagerun" in last
    odd = parameters(card_of(request, {**FACTS, "model": "folder/a, b: c"}))
    assert 'Model: "a, b: c"' in odd


def test_a_folder_model_has_no_revision(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    facts = {**FACTS, "model": "models/x", "identity": "sha256:" + "0" * 64}
    path.write_bytes(png(pixels(), card_of(asked()[0], facts)))
    assert read_card(path).revision is None


def test_no_metadata_means_none(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(png(pixels(), None))
    with Image.open(path) as image:
        assert not image.info
    with pytest.raises(ValueError, match="no runner metadata"):
        read_card(path)


HEADER, PIXEL = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), chunk(b"IDAT", zlib.compress(bytes(4)))


def hostile(text: bytes, kind: bytes = b"iTXt") -> bytes:
    body = b"runner\0\0\0\0\0" + text if kind == b"iTXt" else b"runner\0" + text
    return SIGNATURE + HEADER + chunk(kind, body) + PIXEL + chunk(b"IEND", b"")


def changed(**fields: Any) -> bytes:
    return json.dumps({**card_of(asked()[0], FACTS), **fields}).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a PNG"), (b"GIF89a" + bytes(99), "not a PNG"), (SIGNATURE, "not a PNG"),
        (SIGNATURE + HEADER + PIXEL + chunk(b"IEND", b""), "no runner metadata"),
        (hostile(b"{}"), "schema"), (hostile(b"[]"), "not an object"), (hostile(b"{"), "Expecting"),
        (hostile(b"\xff\xfe"), "no runner metadata"), (hostile(b"[" * 200_000), "recursion"),
        (hostile(b"9" * 5000), "digit"), (hostile(b" " * 300_000 + changed()), "the limit is 262,144"),
        (hostile(changed()).replace(b'"steps"', b'"stepz"'), "a damaged one"),
        (hostile(changed(steps=float("nan"))), "NaN"), (hostile(changed(steps="4")), "steps must be"),
        (hostile(changed(steps=True)), "steps must be"), (hostile(changed(steps=10**6)), "steps must be"),
        (hostile(changed(prompt=["x"])), "prompt must be text"), (hostile(changed(prompt="\ud800")), "UTF-8"),
        (hostile(changed(prompt="\x1b[2J")), "U+001B"), (hostile(changed(width=10**9)), "width must be"),
        (hostile(changed(seed=-1)), "seed must be"), (hostile(changed(schema=True)), "schema"),
        (hostile(changed(schema=2)), "this version reads 1"), (hostile(changed(family="sdxl")), "family 'sdxl'"),
        (hostile(changed(model="a\x1b[2Jb")), "model in its metadata"), (hostile(changed(model="")), "model in its"),
        (hostile(changed(model={"a": 1})), "model in its"), (hostile(changed(dtype="x")), "dtype in its"),
        (hostile(changed(dtype={"vae": 1})), "dtype in its"),
        (hostile(b'{"schema": 1}'), "lack 'prompt'"),
        (hostile(changed(scheduler="Euler")), "scheduler in its metadata"),
        (hostile(changed(scheduler={"name": "os.system", "config": {}})), "no name of a class"),
        (SIGNATURE + b"\xff\xff\xff\xfftEXt" + bytes(9), "not a PNG"),
        (SIGNATURE + HEADER + PIXEL * 20_000, "no runner metadata"),
    ],
)
def test_a_hostile_picture_is_refused_by_name(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "hostile.png"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_card(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_text_behind_the_pixels_is_read_too(tmp_path: Path) -> None:
    body = b"runner\0\0\0\0\0" + changed()
    path = tmp_path / "p.png"
    path.write_bytes(SIGNATURE + HEADER + PIXEL + chunk(b"iTXt", body) + chunk(b"IEND", b""))
    assert read_card(path).request == asked()[0]


def test_text_of_another_writer_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(hostile(changed(), b"tEXt"))
    assert read_card(path).request == asked()[0]


def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for name, says in (("fifo.png", "plain file"), ("gone.png", "No such file"), (".", "plain file|directory")):
        with pytest.raises(ValueError, match=says):
            read_card(tmp_path / name)


def test_names_are_a_file_a_folder_or_a_template(tmp_path: Path) -> None:
    three = asked("A Red Circle!", 3)
    base = str(tmp_path)
    assert choose(f"{base}/x.png", three[:1], run="r") == [tmp_path / "x.png"]
    folder = [tmp_path / f"{index}-a-red-circle-{42 + index}.png" for index in range(3)]
    assert choose(base, three, run="r") == folder
    assert choose(f"{base}/new/", three[:1], run="r") == [tmp_path / "new" / "a-red-circle-42.png"]
    assert choose(f"{base}/{{run}}/{{index}}_{{prompt}}.PNG", three, run="2026-X")[2] == (
        tmp_path / "2026-x" / "2_a-red-circle.PNG"
    )
    assert choose(None, three[:1], run="r") == [Path("a-red-circle-42.png")]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("cat.jpg", "must end in .png, or in / for a folder"), ("cat", "must end in .png"), ("", "is empty"),
        ("a\0b.png", "no name"), ("a\x1b[2J.png", "no name"), ("a\udcff.png", "no name"),
        ("{sed}.png", r"mean \{seed\}"),
        ("{prompt.__class__}.png", "unknown field"), ("{zzz}.png", "there are"), ("{index}/../../x.png", "leaves"),
        ("x" * 252 + ".png", "the limit is 255"), ("x.png", r"cannot both be .*out='.*x-\{index\}.png'"),
        ("taken.png", "is there already -> overwrite"), ("dangling.png", "is there already"),
        ("file/x.png", "is not a folder"), ("y" * 300 + "/x.png", "the limit is 255"),
    ],
)
def test_a_bad_name_is_refused_before_anything_is_made(tmp_path: Path, out: str, says: str) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=says):
        choose(f"{tmp_path}/{out}" if out else out, asked(count=2 if out == "x.png" else 1), run="r")
    assert sorted(tmp_path.iterdir()) == before


def test_overwrite_takes_a_file_but_never_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken.png").touch()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "42.png").mkdir()
    assert choose(f"{tmp_path}/taken.png", asked(), run="r", overwrite=True) == [tmp_path / "taken.png"]
    with pytest.raises(ValueError, match="is a folder"):
        choose(f"{tmp_path}/x/{{seed}}.png", asked(), run="r", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours_is_refused_before_the_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write in"):
        choose(f"{tmp_path}/x.png", asked(), run="r")
    tmp_path.chmod(0o700)


BITS = [
    "../", "..\\", "/etc/passwd", "~root/", "\u202e", "%2e%2e/", "C:\\", "con", ".", "..", "-rf", "$(id)", "`id`",
    "|sh", "a/b", "\u2025/", "\uff0e\uff0e\uff0f", "{run}", "{index!r}", "*", "?", "'", '"', "\n", "\t", " ",
    "\U0001f600", "x" * 500,
]


def test_two_hundred_hostile_names_stay_in_their_folder(tmp_path: Path) -> None:
    names = sorted({f"{a}{b}" for a in BITS for b in BITS})[::3][:200]
    assert len(names) == 200
    home = tmp_path / "home"
    for name in names:
        request = asked(name if name.strip() else f"{name}x")
        for out in (f"{home}/", f"{home}/{{prompt}}.png", f"{home}/{{prompt}}/{{run}}.png"):
            [path] = choose(out, request, run=name, overwrite=True)
            real = os.path.realpath(path)
            assert os.path.commonpath((real, os.path.realpath(home))) == os.path.realpath(home)
            assert path.name.isascii() and len(path.name) <= 100 and not path.name.startswith(("-", "."))
            write(path, b"x", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"home"}


def test_a_symlink_below_the_chosen_folder_is_not_followed(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "a-red-circle").symlink_to(away)
    with pytest.raises(ValueError, match="leads out of"):
        choose(f"{home}/{{prompt}}/{{seed}}.png", asked(), run="r")
    linked = tmp_path / "linked"
    linked.symlink_to(home)
    assert choose(f"{linked}/x.png", asked(), run="r") == [linked / "x.png"]


def test_a_symlink_at_the_name_is_replaced_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "x.png"
    victim.write_bytes(b"mine")
    path.symlink_to(victim)
    write(path, b"new", overwrite=True)
    assert (victim.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"mine", b"new", False)


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    write(path, b"first")
    with pytest.raises(ValueError, match="is there already"):
        write(path, b"second")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and path.read_bytes() == b"first"

    def unable(*paths: str, **folders: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unable)
    write(tmp_path / "y.png", b"exfat")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png", "y.png"]


def test_a_full_disk_leaves_no_torn_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*x\.png \(3 bytes\): No space left"):
        write(tmp_path / "x.png", b"new")
    assert list(tmp_path.iterdir()) == []


def test_slug_is_short_ascii() -> None:
    assert slug("A Red Circle, above: B\u00e9b\u00e9!") == "a-red-circle-above-bebe"
    assert slug("\U0001f600") == slug("///") == "picture"
    assert len(slug("x" * 10**6)) == 60
