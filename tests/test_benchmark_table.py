"""What the benchmarks share."""

import json
from pathlib import Path

from benchmarks.table import in_turns, machine, markdown, median, spread, write


def test_ways_take_turns_and_the_warming_round_is_not_kept() -> None:
    order: list[str] = []

    def way(name: str) -> dict[str, float]:
        order.append(name)
        return {"seconds": float(len(order))}

    raw = in_turns({"a": lambda: way("a"), "b": lambda: way("b")}, 3)
    assert order == ["a", "b"] * 4
    assert [found["seconds"] for found in raw["a"]] == [3, 5, 7] and median(raw, "b", "seconds") == 6
    assert spread(raw, "b", "seconds", 10, 0) == "60 (40 to 80)"


def test_tables_are_markdown_and_raw_figures_are_kept_with_the_machine(tmp_path: Path) -> None:
    assert markdown(["way", "s"], [["a", 1], ["b", 2.5]]) == "| way | s |\n| --- | ---: |\n| a | 1 |\n| b | 2.5 |"
    write(str(tmp_path / "x.json"), {"a": [{"s": 1.0}]}, bytes=4)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["raw"] == {"a": [{"s": 1.0}]} and found["bytes"] == 4
    assert found["machine"]["versions"]["torch"] == machine()["versions"]["torch"]  # type: ignore[index]
    write(None, {})
    assert len(list(tmp_path.iterdir())) == 1
