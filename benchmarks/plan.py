"""Predicted against measured peaks: python -m benchmarks.plan [--model FOLDER].

For several sizes, batches, lanes and placements, a run is planned and made on simulated cards, which count every byte;
a model of random numbers is made in float32 unless --model names another. Too little foreseen would be out of memory
on a card that is full, too much a card that is not used.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Figures, markdown, write
from runner import Job, Request, make_plan, run_all

ROOM = 16_000_000_000
STEPS = 2
# Name, size, pictures, and what make_plan is told.
CASES: Sequence[tuple[str, tuple[int, int], int, Mapping[str, Any]]] = (
    ("32x32", (32, 32), 1, {}),
    ("128x96", (128, 96), 1, {}),
    ("256x128", (256, 128), 1, {}),
    ("160x320", (160, 320), 1, {}),
    ("384x384", (384, 384), 1, {}),
    ("128x128, four pictures", (128, 128), 4, {}),
    ("128x128, no modulation table", (128, 128), 1, {"modulation_table": False}),
    ("128x128 on two cards", (128, 128), 1, {"place": ["denoise=sharded"]}),
    ("128x128 on two cards, two lanes", (128, 128), 2, {"place": ["denoise=sharded"], "lanes": 2}),
    ("256x256 on two cards, three lanes", (256, 256), 3, {"place": ["denoise=sharded"], "lanes": 3}),
    ("128x128, blocks wait on the host", (128, 128), 1, {"place": ["denoise=streamed"], "allow_offload": "cpu",
                                                          "max_memory": "part"}),
)


def measured(
    model: Path, cards: Sequence[str], size: tuple[int, int], pictures: int, said: Mapping[str, Any]
) -> Figures:
    """Bytes by stage and card: as planned, and as they were."""
    options = dict(said)
    if "max_memory" in options:
        weight = sum(file.stat().st_size for file in (model / "transformer").glob("*.safetensors"))
        options["max_memory"] = f"{weight * 2 // 3}B"
    requests = [Request("a red circle", *size, STEPS, 3.5, seed, 32, index=seed) for seed in range(pictures)]
    plan = make_plan(Job("flux", requests, model=model, devices=cards, dtype={"": torch.float32}, **options))
    found: dict[str, float] = {}
    for stage in run_all(plan).stages:
        for card, need in plan.needs[stage.stage].items():
            if card in cards:
                found[f"{stage.stage} {card} foreseen"] = need.total
                found[f"{stage.stage} {card} measured"] = stage.peak[card]
    return found


def ratios(found: Figures) -> list[float]:
    """Foreseen over measured, of every stage and card."""
    return [size / found[name.replace("foreseen", "measured")] for name, size in found.items() if "foreseen" in name]


def shown(raw: Mapping[str, Figures]) -> str:
    """The Markdown table."""
    rows = []
    for name, found in raw.items():
        peak = max(size for figure, size in found.items() if figure.startswith("denoise") and "measured" in figure)
        rows.append([name, f"{peak / 1e6:.2f}", f"{min(ratios(found)):.3f}", f"{max(ratios(found)):.3f}"])
    every = [ratio for found in raw.values() for ratio in ratios(found)]
    rows.append(["all", "", f"{min(every):.3f}", f"{max(every):.3f}"])
    return markdown(["", "denoise peak MB", "foreseen / measured, least", "most"], rows)


def main() -> None:
    """Plan and run every case once, for bytes are the same every time, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many of the cases")
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    from tests import sim

    sim.configure([ROOM, ROOM])
    with tempfile.TemporaryDirectory() as folder:
        from tests.tiny import flux

        model = said.model or flux(Path(folder) / "flux", doubles=10, singles=19, heads=5, text=96, text_layers=24)
        raw = {name: measured(model, ["sim:0", "sim:1"], size, pictures, options)
               for name, size, pictures, options in CASES[:said.cases]}
    print(shown(raw))
    write(said.json, raw, room=ROOM, steps=STEPS)


if __name__ == "__main__":
    main()
