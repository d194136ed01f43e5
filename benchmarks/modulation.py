"""What the modulation table costs and saves: python -m benchmarks.modulation [--model FOLDER] [--device NAME].

Without a model, a FLUX transformer of 1.2 GB in float32 is made of random numbers. Each way runs in its own process
and reads the same files, which are in the page cache by then.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 4


def measure(model: Path, device: str, pictures: int, table: bool) -> dict[str, float]:
    """Seconds and bytes of one run up to the latents."""
    from runner import Request, make_plan, run_all

    requests = [Request("a red circle", 64, 64, STEPS, 3.5, seed, 32, index=seed) for seed in range(pictures)]
    plan = make_plan("flux", requests, model=model, devices=[device], modulation_table=table)
    stage = run_all(plan, stop_after="denoise").stages[1]
    return {"weights": plan.weights["transformer"].total, "peak": max(stage.peak.values(), default=0),
            **{part: stage.seconds.get(part, 0.0) for part in ("table", "load", "compute")}}


def in_process(*words: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.modulation", *words], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run both ways, first once to fill the page cache, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--one", choices=["with", "without"], help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.one:
        print(json.dumps(measure(said.model, said.device, said.pictures, said.one == "with")))
        return
    with tempfile.TemporaryDirectory() as folder:
        if said.model is None:
            from tests.tiny import flux

            said.model = flux(Path(folder) / "flux", doubles=4, singles=8, heads=64)
        words = ["--model", str(said.model), "--device", said.device, "--pictures", str(said.pictures), "--one"]
        in_process(*words, "without")
        print(f"{'':10}{'weights GB':>12}{'peak GB':>10}{'table s':>10}{'load s':>10}{'compute s':>11}")
        for way in ("without", "with"):
            found = in_process(*words, way)
            print(f"{way:10}{found['weights'] / 1e9:12.2f}{found['peak'] / 1e9:10.2f}{found['table']:10.2f}"
                  f"{found['load']:10.2f}{found['compute']:11.2f}")


if __name__ == "__main__":
    main()
