"""Requests are checked before anything heavy is imported: limits, nearest sizes, seeds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.inputs import PIXELS, SEED, read_guidance, read_size, read_whole
from runner.request import Request, requests_for
from runner.sizes import nearest_sizes
from runner.text import shown
from stages.families import FAMILIES

GOOD: dict[str, Any] = {
    "prompt": "a red circle", "width": 128, "height": 64, "steps": 4, "guidance": 3.5, "seed": 7, "text_tokens": 24,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "x"), ("prompt", "x" * 16384), ("prompt", "-dash"), ("prompt", "two\nlines\tand a tab"),
        ("prompt", "\N{GRINNING FACE}\u200d" + "e\u0301" * 2000), ("prompt", "\u202ereversed"),
        ("steps", 1), ("steps", 1000), ("guidance", None), ("guidance", 0), ("guidance", 30.0),
        ("seed", 0), ("seed", 2**64 - 1), ("width", 1), ("width", 16384),
    ],
)
def test_limits_are_inside(name: str, value: Any) -> None:
    assert getattr(Request(**{**GOOD, name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("prompt", "", "empty prompt"), ("prompt", " \n\t ", "empty prompt"),
        ("prompt", "x" * 16385, "16,385 bytes; the limit is 16,384"), ("prompt", "\u00e9" * 8193, "16,386 bytes"),
        ("prompt", "a\0b", "U+0000 at position 1"), ("prompt", "\x1b[2J", "U+001B"), ("prompt", "a\x9bb", "U+009B"),
        ("prompt", "caf\u00e9 \udcff", "not valid UTF-8 at byte 6"), ("prompt", "\ud800", "UTF-8 at byte 0"),
        ("prompt", None, "must be text"), ("prompt", b"x", "must be text"),
        ("steps", 0, "1 to 1000, got 0"), ("steps", -1, "got -1"), ("steps", 1001, "got 1001"),
        ("steps", 2.5, "got 2.5"), ("steps", True, "got True"),
        ("guidance", float("nan"), "got nan"), ("guidance", float("inf"), "got inf"), ("guidance", 1e30, "0 to 30"),
        ("guidance", -1, "got -1"), ("guidance", 30.01, "got 30.01"), ("guidance", "3", "got '3'"),
        ("seed", -5, "got -5"), ("seed", 2**64, "got 18446744073709551616"), ("seed", 1.5, "got 1.5"),
        ("width", 0, "width must be"), ("height", -16, "height must be"), ("height", 100000, "got 100000"),
        ("text_tokens", 0, "got 0"), ("index", -1, "got -1"),
    ],
)
def test_outside_is_refused_with_the_value(name: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        Request(**{**GOOD, name: value})
    assert says in str(caught.value)


def test_too_many_pixels_are_refused_with_a_size_of_the_same_shape_that_fits() -> None:
    assert Request(**{**GOOD, "width": 2048, "height": 2048}).width == 2048
    says = r"2048x2049 is 4,196,352 pixels; the limit is 4,194,304 -> width=1984, height=2048"
    with pytest.raises(ValueError, match=says):
        Request(**{**GOOD, "width": 2048, "height": 2049})
    with pytest.raises(ValueError, match="-> width=2048, height=2048"):
        Request(**{**GOOD, "width": 16384, "height": 16384})


@pytest.mark.parametrize(
    ("size", "multiple", "pair"),
    [
        ((33, 32), 16, ((32, 32), (48, 32))),
        ((1000, 1000), 16, ((992, 992), (1008, 1008))),
        ((1, 1), 16, ((16, 16), (16, 32))),
        ((2050, 2048), 16, ((2048, 2048), (2048, 2032))),
        ((16384, 255), 16, ((16384, 256), (16384, 240))),
    ],
)
def test_nearest_two_sizes(size: tuple[int, int], multiple: int, pair: object) -> None:
    assert nearest_sizes(size, multiple) == pair


@given(st.integers(1, 2048), st.integers(1, 2048), st.sampled_from([8, 16, 32, 64]))
def test_nearest_sizes_are_legal_and_the_first_is_no_further_than_half_a_multiple(w: int, h: int, m: int) -> None:
    first, second = nearest_sizes((w, h), m)
    assert first != second
    for width, height in (first, second):
        assert width % m == height % m == 0 < width * height <= PIXELS
    assert all(abs(near - side) <= max(m // 2, m - side) for near, side in zip(first, (w, h), strict=True))


def test_requests_are_filled_from_the_family_and_count_the_seed_up() -> None:
    one, two, three = requests_for("a red circle", FAMILIES["flux"], seed=41, count=3, size=(512, 256))
    assert (one.seed, two.seed, three.seed) == (41, 42, 43)
    assert [r.index for r in (one, two, three)] == [0, 1, 2]
    assert (one.width, one.height, one.steps, one.guidance, one.text_tokens) == (512, 256, 28, 3.5, 512)


def test_random_seeds_differ_also_for_the_generator_of_torch() -> None:
    drawn = {requests_for("x", FAMILIES["demo"])[0].seed for _ in range(8)}
    assert len(drawn) == 8 and max(drawn) < 2**32


def test_ask_refuses_a_wrap_around_and_what_the_family_does_not_take() -> None:
    assert requests_for("x", FAMILIES["demo"], seed=SEED - 1, count=2)[1].seed == SEED
    with pytest.raises(ValueError, match="pass the last seed"):
        requests_for("x", FAMILIES["demo"], seed=SEED, count=2)
    with pytest.raises(ValueError, match="flux-schnell takes no guidance"):
        requests_for("x", FAMILIES["flux-schnell"], guidance=3.0)
    with pytest.raises(ValueError, match="steps must be"):
        requests_for("x", FAMILIES["flux"], steps=0)
    assert len(requests_for("x", FAMILIES["flux"], count=64)) == 64
    for count in (0, -1, 65, 10**9):
        with pytest.raises(ValueError, match="1 to 64"):
            requests_for("x", FAMILIES["flux"], count=count)


@pytest.mark.parametrize("text", ["2.5", "0x1F", "1e3", "1_000", " 5", "", "9" * 5000, "\u0663", "nan", "0", "11"])
def test_a_whole_number_is_plain_digits_in_range(text: str) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 10, got") as caught:
        read_whole("steps", text, 1, 10)
    assert len(str(caught.value)) < 140


def test_readers_take_what_people_write() -> None:
    assert read_whole("seed", "-1", -1, SEED) == -1
    assert read_whole("seed", str(SEED), -1, SEED) == SEED
    assert (read_guidance("3.5"), read_guidance("0"), read_guidance(".5"), read_guidance("1e1")) == (3.5, 0, 0.5, 10)
    assert (read_size("1024x768"), read_size("64X32")) == ((1024, 768), (64, 32))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e30", "-1", "three", "1_0", "", "9" * 5000, "1e999", "31"])
def test_guidance_is_finite_and_in_range(text: str) -> None:
    with pytest.raises(ValueError, match="guidance must be a number from 0 to 30, got"):
        read_guidance(text)


@pytest.mark.parametrize("text", ["", "1024*768", "axb", "0x64", "64x-16", "1x", "x1", "9" * 5000 + "x1", "1.5x2"])
def test_size_is_two_positive_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"size must be WxH|width must be|height must be"):
        read_size(text)


def test_shown_is_short_ascii() -> None:
    assert shown("\x1b]0;caf\u00e9") == r"'\x1b]0;caf\xe9'"
    assert len(shown("\u00e9" * 10**6)) < 300


@pytest.mark.parametrize(("name", "most"), [("flux", 512), ("sd3", 512), ("qwen-image", 1024)])
def test_no_more_text_tokens_than_the_encoder_takes(name: str, most: int) -> None:
    (request,) = requests_for("a red circle", FAMILIES[name], seed=1, text_tokens=most)
    assert request.text_tokens == most
    with pytest.raises(ValueError, match=f"{most + 1} text tokens: .* {name} takes at most {most}"):
        requests_for("a red circle", FAMILIES[name], seed=1, text_tokens=most + 1)


def test_a_negative_prompt_is_for_families_that_read_one_and_for_guidance_over_1() -> None:
    sd3 = FAMILIES["sd3"]
    both = requests_for("x", sd3, negative_prompt="blurry", count=2)
    assert [one.negative_prompt for one in both] == ["blurry", "blurry"]
    assert requests_for("x", sd3, seed=1, negative_prompt="") == requests_for("x", sd3, seed=1)
    for family in ("flux", "flux2-klein-base", "z-image"):
        with pytest.raises(ValueError, match=f"{family} reads no negative prompt -> leave negative_prompt out"):
            requests_for("x", FAMILIES[family], negative_prompt="blurry")
        assert requests_for("x", FAMILIES[family], negative_prompt="")[0].negative_prompt is None
    for guidance in (0.0, 1.0):
        with pytest.raises(ValueError, match=f'is {guidance} -> guidance over 1, or negative_prompt="" for none'):
            requests_for("x", sd3, negative_prompt="blurry", guidance=guidance)
    for negative, says in ((5, "the negative prompt must be text"), (" ", "empty negative prompt -> say what guid"),
                           ([], "text"), ("a\x07", "the negative prompt has the control character U\\+0007")):
        with pytest.raises(ValueError, match=says):
            requests_for("x", sd3, negative_prompt=negative)  # type: ignore[arg-type]
