"""What the modulation table costs and saves: python -m benchmarks.modulation [--model FOLDER] [--device NAME].

Without a model, a FLUX transformer of 1.2 GB in float32 is made of random numbers; without a device, it runs on a
simulated card, where loading copies every byte as it would to a real one. The files are in the page cache.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.table import Figures, Raw, in_turns, markdown, median, spread, write

STEPS = 4


def measured(model: Path, device: str, pictures: int, table: bool) -> Figures:
    """Seconds and bytes of one run up to the latents, in float32: CPUs without bfloat16 take ages for it."""
    import torch

    from runner import Job, Request, RunPolicy, make_plan, run_all

    requests = [Request("a red circle", 64, 64, STEPS, 3.5, seed, 32, index=seed) for seed in range(pictures)]
    plan = make_plan(Job("flux", requests, model=model, devices=[device], dtype={"": torch.float32},
                         modulation_table=table))
    stage = run_all(plan, RunPolicy(stop_after="denoise")).stages[1]
    return {"weights": plan.weights["denoise", "transformer"].total, "peak": max(stage.peak.values(), default=0),
            **{part: stage.seconds.get(part, 0.0) for part in ("table", "load", "compute")}}


def rows(raw: Raw) -> list[list[object]]:
    """A row per way, and how the two compare."""
    found: list[list[object]] = [
        [way, *(spread(raw, way, name, 1e-9, 2) for name in ("weights", "peak")),
         *(spread(raw, way, name, 1.0, 2) for name in ("table", "load", "compute"))]
        for way in raw
    ]
    saved = median(raw, "without", "load") - median(raw, "with", "load")
    peak = median(raw, "with", "peak") / median(raw, "without", "peak")
    found.append(["with / without", f"{median(raw, 'with', 'weights') / median(raw, 'without', 'weights'):.2f}",
                  f"{peak:.2f}", f"{median(raw, 'with', 'table'):.2f} s spent", f"{saved:.2f} s saved",
                  f"{median(raw, 'with', 'compute') / median(raw, 'without', 'compute'):.2f}"])
    return found


def main() -> None:
    """Run both ways in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--heads", type=int, default=64, help="width of the model that is made, in heads of 16")
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    if said.device is None:
        from tests import sim

        sim.configure([16_000_000_000])
    with tempfile.TemporaryDirectory() as folder:
        from tests.tiny import flux

        model = said.model or flux(Path(folder) / "flux", doubles=4, singles=8, heads=said.heads)
        ways = {way: lambda way=way: measured(model, said.device or "sim:0", said.pictures, way == "with")
                for way in ("without", "with")}
        raw = in_turns(ways, said.repeats)
        print(markdown(["table", "weights GB", "peak GB", "table s", "load s", "compute s"], rows(raw)))
        write(said.json, raw, pictures=said.pictures, steps=STEPS)


if __name__ == "__main__":
    main()
