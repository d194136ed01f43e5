"""Pictures as WebP and JPEG: what they keep of the pixels, what they say, and what is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.commands.cli import answer
from runner.media.formats import LONGEST_PROMPT, LONGEST_SIDE, format_of
from runner.media.image import card_of, parameters, picture_file, read_card, shows
from runner.media.paths import Naming
from runner.request import Request, requests_for
from stages.errors import InvalidInput
from stages.families import FAMILIES
from tests.test_cli import base, elsewhere
from tests.test_picture import FACTS, TRAP, asked, pixels

__all__ = ["elsewhere"]
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".JPG", ".WebP")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", ["a red circle", TRAP, "caf\u00e9 \u732b \U0001f600\u202e", '"{}\\\t'])
def test_each_format_says_what_made_it(tmp_path: Path, suffix: str, prompt: str) -> None:
    [request] = asked(prompt)
    path, card = tmp_path / f"x{suffix}", card_of(request, FACTS)
    path.write_bytes(picture_file(path, pixels(), card))
    said = read_card(path)
    assert (said.request, said.family, said.model, said.dtype) == (request, "flux", FACTS["model"], FACTS["dtype"])
    with Image.open(path) as image:
        assert image.format == format_of(path) and image.size == (32, 16)
        close = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels())
        assert close.max() == 0 if format_of(path) != "JPEG" else 0 < close.mean() < 8
        if format_of(path) != "PNG":
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment == b"UNICODE\0" + parameters(card).encode("utf-16-be")
    assert shows(path, pixels()) and not shows(path, pixels()[::-1].copy())
    path.write_bytes(picture_file(path, pixels(), None))
    with pytest.raises(InvalidInput, match="no runner metadata"):
        read_card(path)
    with Image.open(path) as image:
        assert not image.getexif()


def test_the_longest_prompts_have_room_or_are_refused_before_the_run(tmp_path: Path) -> None:
    most = LONGEST_PROMPT["JPEG"]
    quotes, dashes = '"' * (most // 2), "\\" * (most // 2)
    fits = requests_for(quotes, FAMILIES["qwen-image"], size=(32, 16), negative_prompt=dashes)[0]
    path = tmp_path / "x.jpg"
    assert Naming(str(path), run="r", total=1).path(fits) == path
    path.write_bytes(picture_file(path, pixels(), card_of(fits, {**FACTS, "family": "qwen-image"})))
    assert read_card(path).request == fits
    longer = requests_for("x" * 16384, FAMILIES["qwen-image"], size=(32, 16), negative_prompt="y" * 16384)[0]
    with pytest.raises(InvalidInput, match=r"no room for prompts of 32,768 bytes.*\.png or \.webp"):
        Naming(str(tmp_path / "y.jpg"), run="r", total=1).path(longer)
    webp = tmp_path / "y.webp"
    assert Naming(str(webp), run="r", total=1).path(longer) == webp
    webp.write_bytes(picture_file(webp, pixels(), card_of(longer, {**FACTS, "family": "qwen-image"})))
    assert read_card(webp).request == longer
    wide = Request("x", LONGEST_SIDE["WEBP"] + 1, 16, 1, None, 1, 8)
    with pytest.raises(InvalidInput, match=r"at most 16,383 pixels a side"):
        Naming(str(tmp_path / "z.webp"), run="r", total=1).path(wide)


def exif(note: bytes) -> bytes:
    """A JPEG whose MakerNote is this."""
    file = Image.Exif()
    file.get_ifd(0x8769)[0x927C] = note
    path = Path("note.jpg")
    Image.new("RGB", (8, 8)).save(path, exif=file.tobytes())
    return path.read_bytes()


@pytest.mark.parametrize(("note", "says"), [
    (b"another maker", "no runner metadata"), (b"stagerun\0{", "Expecting"), (b"stagerun\0[]", "not an object"),
    (b"stagerun\0\xff\xfe", "utf-8"), (b"stagerun\0{}", "schema"), (b"stagerun\0" + b"[" * 60_000, "recursion"),
])
def test_a_hostile_note_is_refused_by_name(note: bytes, says: str) -> None:
    Path("hostile.jpg").write_bytes(exif(note))
    with pytest.raises(InvalidInput) as caught:
        read_card("hostile.jpg")
    assert "hostile.jpg" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("data", [
    b"\xff\xd8\xff", b"RIFF\xff\xff\xff\xffWEBPVP8L",
    b"\xff\xd8\xff\xe1" + struct.pack(">H", 40) + b"Exif\0\0" + b"MM\0*" * 9,
])
def test_a_damaged_file_is_refused_by_name(data: bytes) -> None:
    Path("torn.jpg").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"torn\.jpg"):
        read_card("torn.jpg")


def test_a_run_writes_each_and_repeats_each(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = base(flux, "a fox", "-s", "3", "-q")
    for name in ("x.png", "x.webp", "x.jpg"):
        assert answer([*words, "-o", name]) == 0
        # The same picture is there already: it is left, not refused.
        assert answer(["flux", "--like", name, "-q", "-o", f"again-{name}.png"]) == 0
    truth = np.asarray(Image.open("x.png"))
    for name in ("x.webp", "again-x.png.png", "again-x.webp.png", "again-x.jpg.png"):
        assert np.array_equal(truth, Image.open(name).convert("RGB")), name
    assert 0 <= np.abs(np.asarray(Image.open("x.jpg")).astype(int) - truth).mean() < 8
    capsys.readouterr()
    Path("p.jsonl").write_text('{"prompt": "a fox", "out": "one.webp"}\n{"prompt": "a fox", "out": "two.bmp"}\n')
    assert answer([*base(flux, "--prompt-file", "p.jsonl", "-o", "pictures/"), "--json"]) == 1
    told: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["path"] for each in told if each["kind"] == "picture"] == ["pictures/one.webp"]
    assert any("must end in .png, .webp, .jpg or .jpeg" in each["text"] for each in told if each["kind"] == "failed")
