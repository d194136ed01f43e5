"""The guides' sharding recipe beside a run of ours: python -m benchmarks.sharding [--model FOLDER] [--cap BYTES].

Both make the same picture from the same checkpoint on two simulated cards; without a model, one of random numbers is
made, whose transformer is larger than a card. Each measurement is a process of its own; imports are not counted. Then
the cards shrink until each way fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.tutorial import tutorial
from runner import Job, Request, make_plan, run_all

PROMPT = "a red circle"
SIZE = (128, 128)
STEPS, GUIDANCE, TOKENS, SEED = 8, 3.5, 64, 7
PARTS = ("plan", "encode", "denoise", "decode")
FLOOR = 0.02
SHORTAGES = ("out of memory", "NoStrategyFits", "doesn't fit", "offloaded to the disk")
Figures = dict[str, float]


def recipe(model: Path, cap: int) -> Figures:
    """The recipe's figures."""
    from tests import sim

    sim.configure([cap, cap])
    pixels, figures = tutorial(model, {"sim:0": cap, "sim:1": cap}, PROMPT, size=SIZE, steps=STEPS, tokens=TOKENS,
                               guidance=GUIDANCE, seed=SEED, dtype=torch.float32)
    return found(figures.seconds, figures.peak, pixels.tobytes())


def ours(model: Path, cap: int, *, table: bool) -> Figures:
    """Our figures, with the plan's own choice of places; without the modulation table the transformer is whole."""
    import time

    from tests import sim

    sim.configure([cap, cap])
    begin = time.perf_counter()
    request = Request(PROMPT, *SIZE, STEPS, GUIDANCE, SEED, TOKENS)
    plan = make_plan(Job("flux", [request], model=model, dtype={"": torch.float32}, modulation_table=table))
    seconds = {"plan": time.perf_counter() - begin}
    report = run_all(plan)
    peak: dict[str, int] = {}
    for stage in report.stages:
        seconds[stage.stage] = sum(stage.seconds.values())
        peak |= {card: max(most, peak.get(card, 0)) for card, most in stage.peak.items()}
    return found(seconds, peak, report.pictures[0].pixels.tobytes())


def found(seconds: Mapping[str, float], peak: Mapping[str, int], pixels: bytes) -> Figures:
    """The figures of a way: bytes on each card, bytes copied to cards, seconds by part, and a sum of the pixels."""
    import zlib

    from tests import sim

    loaded = sum(count for (source, _), count in sim.copied().items() if source == "cpu")
    return {**{part: seconds.get(part, 0.0) for part in PARTS}, "total": sum(seconds.values()), "loaded": loaded,
            "first": peak["sim:0"], "second": peak["sim:1"], "pixels": zlib.crc32(pixels)}


WAYS: dict[str, Callable[[Path, int], Figures]] = {
    "the recipe": recipe,
    "ours": partial(ours, table=True),
    "ours, no modulation table": partial(ours, table=False),
}


def in_its_own_process(way: str, model: Path, cap: int) -> Figures | None:
    """The figures of a way in a process of its own; None where its cards are too small."""
    words = ["--one", way, "--model", str(model), "--cap", str(cap)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.sharding", *words], capture_output=True, text=True)
    if done.returncode:
        assert any(word in done.stderr for word in SHORTAGES), done.stderr
        return None
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def measured(way: str, model: Path, cap: int) -> Figures:
    """The figures of a way where it must run."""
    figures = in_its_own_process(way, model, cap)
    assert figures is not None, f"{way} does not run on two cards of {cap:,} bytes"
    return figures


def smallest(way: str, model: Path, cap: int) -> int:
    """The bytes of the smallest two equal cards that a way runs on, to 2 % of `cap`."""
    low, high = 0, cap
    while high - low > FLOOR * cap:
        middle = (low + high) // 2
        low, high = (low, middle) if in_its_own_process(way, model, middle) is not None else (middle, high)
    return high


def weights(model: Path, component: str) -> int:
    """The bytes of a component's files."""
    return sum(file.stat().st_size for file in (model / component).glob("*.safetensors"))


def main() -> None:
    """Measure every way in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cap", type=int, help="bytes of each card; 70 %% of the transformer's if not said")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="a file for the raw figures")
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.one:
        print(json.dumps(WAYS[said.one](said.model, said.cap)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if said.model is None:
            from tests.tiny import flux

            said.model = flux(Path(folder) / "flux", doubles=6, singles=12, heads=10, text=256, text_layers=12)
        cap = said.cap or weights(said.model, "transformer") * 7 // 10
        raw = table.in_turns({way: partial(measured, way, said.model, cap) for way in WAYS}, said.repeats)
        least = {way: smallest(way, said.model, cap) for way in WAYS}
        sizes = {component: weights(said.model, component) for component in ("text_encoder_2", "transformer")}
    print(shown(raw, least, cap, sizes))
    table.write(said.json, raw, cap=cap, weights=sizes, smallest=least)


def shown(raw: table.Raw, least: Mapping[str, int], cap: int, sizes: Mapping[str, int]) -> str:
    """The Markdown table."""
    whole = table.median(raw, next(iter(raw)), "total")
    pictures = {table.median(raw, way, "pixels") for way in raw}
    rows = [[way, *(f"{table.median(raw, way, card) / cap:.0%}" for card in ("first", "second")),
             f"{table.median(raw, way, 'loaded') / sum(sizes.values()):.2f}",
             *(f"{table.median(raw, way, part) / whole:.2f}" for part in (*PARTS, "total")),
             f"{least[way] / sizes['transformer']:.0%}"] for way in raw]
    head = ["", "peak, card 0", "peak, card 1", "bytes to cards", *PARTS, "total", "smallest cards"]
    facts = (f"Two cards of {cap / 1e6:.1f} MB; T5 {sizes['text_encoder_2'] / 1e6:.1f} MB, transformer "
             f"{sizes['transformer'] / 1e6:.1f} MB in float32; {SIZE[0]}x{SIZE[1]}, {STEPS} steps. Peaks are parts of "
             f"a card, bytes of those two components, times of the recipe's total, smallest cards of the transformer. "
             f"The pictures are {'equal, bit for bit' if len(pictures) == 1 else 'NOT equal'}.")
    return f"{table.markdown(head, rows)}\n\n{facts}"


if __name__ == "__main__":
    main()
