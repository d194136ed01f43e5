"""The charts of a run's record say what the record says, to the byte and the pixel."""

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from runner.reports.charts.blocks import blocks, named, runs
from runner.reports.charts.drawing import Axis, Drawing
from runner.reports.charts.gantt import gantt
from runner.reports.charts.timeline import memory, thin
from tests.records import MIB, record

SPACE = "{http://www.w3.org/2000/svg}"
WIDTHS = (960, 640, 350)


def parsed(drawing: Drawing | None) -> ElementTree.Element:
    assert drawing is not None
    svg = str(drawing.__html__())
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def shapes(root: ElementTree.Element, kind: str, tag: str = "rect") -> list[ElementTree.Element]:
    return [one for one in root.iter(f"{SPACE}{tag}") if kind in one.get("class", "").split()]


def title(shape: ElementTree.Element) -> str:
    return shape.findtext(f"{SPACE}title") or ""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("draw", [blocks, memory, gantt])
def test_nothing_leaves_the_drawing(draw: Any, width: int) -> None:
    root = parsed(draw(record(), width))
    height = float(root.get("height", "0"))
    for rect in root.iter(f"{SPACE}rect"):
        x, y, wide, high = (float(rect.get(name, "0")) for name in ("x", "y", "width", "height"))
        assert x >= -3 and x + wide <= width + 3 and y >= -1 and y + high <= height + 1
    for text in root.iter(f"{SPACE}text"):
        assert 0 <= float(text.get("x", "0")) <= width and 0 <= float(text.get("y", "0")) <= height


@pytest.mark.parametrize("width", WIDTHS)
def test_a_block_is_as_high_as_its_bytes(width: int) -> None:
    root = parsed(blocks(record(), width))
    drawn = shapes(root, "block")
    assert len(drawn) == sum(len(parts) for cards in record()["layout"].values() for components in cards.values()
                             for parts in components.values())
    per_mib = {title(shape): float(shape.get("height", "0")) for shape in drawn}
    one, half = per_mib["transformer: transformer_blocks.3, 1.0 MiB"], per_mib[
        "transformer: single_transformer_blocks.2, 512.0 KiB"]
    assert one == pytest.approx(2 * half, abs=0.2) and one > 10
    assert {shape.get("class") for shape in drawn if title(shape).startswith("transformer:")} == {"block c2"}
    assert len([shape for shape in root.iter(f"{SPACE}rect") if "reserve" in shape.get("class", "")]) == 4 + 1
    assert len(shapes(root, "limit", "line")) == 6 + 1


def test_blocks_lie_on_each_other_without_gaps() -> None:
    drawn = list(shapes(parsed(blocks(record(), 960)), "block"))
    columns: dict[str, list[tuple[float, float]]] = {}
    for shape in drawn:
        column = columns.setdefault(shape.get("x", ""), [])
        column.append((float(shape.get("y", "0")), float(shape.get("height", "0"))))
    assert len(columns) == 4
    for column in columns.values():
        assert all(lower[0] == pytest.approx(upper[0] + upper[1], abs=0.15) for lower, upper in pairwise(column))


def test_runs_of_blocks_are_named_by_their_numbers() -> None:
    found = list(runs({"outside blocks": 1, "a.0": 1, "a.1": 1, "b.c.5": 1, "b.c.7": 1}))
    assert [(stem, [block for block, _ in members]) for stem, members in found] == [
        ("outside blocks", ["outside blocks"]), ("a", ["a.0", "a.1"]), ("b.c", ["b.c.5"]), ("b.c", ["b.c.7"])]
    assert named("transformer", "x.single_transformer_blocks", [("x.single_transformer_blocks.2", 1),
                                                                ("x.single_transformer_blocks.9", 1)]) == [
        "single_transformer_blocks 2-9", "single blocks 2-9", "single 2-9", "2-9"]
    assert named("transformer", "transformer_blocks", [("transformer_blocks.3", 1)]) == [
        "transformer_blocks 3", "block 3", "3"]
    assert named("text_encoder_2", "encoder.block", [("encoder.block.0", 1), ("encoder.block.1", 1)]) == [
        "block 0-1", "blocks 0-1", "0-1"]
    assert named("vae", "outside blocks", [("outside blocks", 1)]) == ["vae"]


def test_a_limit_far_above_does_not_flatten_the_blocks() -> None:
    asked = record()
    for device in asked["plan"]["devices"].values():
        device["room"] = 80 * 2**30
    drawn = shapes(parsed(blocks(asked, 960)), "block")
    assert max(float(shape.get("height", "0")) for shape in drawn) > 15


def test_memory_has_a_panel_per_card_with_its_flushes() -> None:
    root = parsed(memory(record(), 960))
    words = ["".join(text.itertext()) for text in root.iter(f"{SPACE}text")]
    assert [text for text in words if ": at most" in text] == [
        "sim:0: at most 12.0 MiB of 14.0 MiB", "sim:1: at most 12.5 MiB of 14.0 MiB", "host: at most 450.0 MiB"]
    flushes = shapes(root, "freed", "line")
    assert len(flushes) == 2 * 3 and "freed 9.2 MiB, left 0 B" in title(flushes[0])
    # The end of the first stage, at 1.5 of 10 seconds between the margins.
    assert float(flushes[0].get("x1", "0")) == pytest.approx(72 + 0.15 * (952 - 72), abs=0.1)


def test_thinned_curves_keep_their_ends_and_their_peaks() -> None:
    points = [(float(at), at % 97) for at in range(5000)] + [(5000.0, 10_000), (5001.0, 3)]
    found = thin(points)
    assert len(found) <= 310 and found[0] == points[0] and (5000.0, 10_000) in found
    assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)
    assert thin(points[:3]) == points[:3]


def test_the_gantt_says_who_took_how_long_on_the_scale_of_the_memory() -> None:
    root = parsed(gantt(record(), 960))
    (compute,) = [shape for shape in shapes(root, "compute") if title(shape).startswith("denoise")]
    assert title(compute) == "denoise, compute: 5.9 s"
    assert float(compute.get("width", "0")) == pytest.approx(5.88 / 10 * (952 - 72), abs=0.1)
    words = ["".join(text.itertext()) for text in root.iter(f"{SPACE}text")]
    assert [text for text in words if ": " in text] == ["encode: 1.5 s", "denoise: 7.4 s", "decode: 900 ms"]
    saves = list(shapes(root, "save"))
    assert len(saves) == 3 and all(float(shape.get("width", "0")) >= 2 for shape in saves)


def test_lanes_get_a_line_each() -> None:
    asked = record()
    spans = asked["timeline"]["spans"]
    spans += [{**span, "lane": 1} for span in spans if (span["stage"], span["part"]) == ("denoise", "compute")]
    words = [text.text for text in parsed(gantt(asked, 640)).iter(f"{SPACE}text")]
    assert "compute 1" in words and "compute 2" in words and words.count("compute") == 2


def test_a_record_of_an_older_version_has_no_charts() -> None:
    old = {name: value for name, value in record().items() if name not in ("timeline", "layout", "plan")}
    assert blocks(old, 960) is memory(old, 960) is gantt(old, 960) is None


@pytest.mark.parametrize(("most", "words"), [(0.34, "0.05 s"), (7.0, "1 s"), (5000.0, "500 s")])
def test_axes_have_round_seconds(most: float, words: str) -> None:
    assert Axis(most, 72, 952).seconds()[1][1] == words


@pytest.mark.parametrize(("most", "words"), [(900, "500 B"), (14 * MIB, "5 MiB"), (80 * 2**30, "50 GiB")])
def test_axes_have_round_bytes(most: int, words: str) -> None:
    ticks = [text for _, text in Axis(most, 200, 100).bytes()]
    assert ticks[:2] == ["0", words]
