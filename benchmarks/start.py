"""How long it takes to --help, to a plan and to the first step: python -m benchmarks.start [--repeats N].

Each is a process of its own, from its start to its end, with files in the page cache: with the demo checkpoint, and
plans of FLUX.1-dev in its real shapes, whose data are holes. A second table shows what a plan imports, and what each
of it costs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.table import Figures, Raw, in_turns, markdown, median, spread, write

RUNNER = ("-m", "runner")
MAKE = ("demo", "--prompt", "a red circle", "--steps", "1", "--size", "64x64", "--seed", "1", "--device", "cpu",
        "--artifacts", "memory", "--quiet")
# Cards that FLUX.1-dev is planned for; on the last two it does not fit, and a way out is looked for.
MACHINES = ("2x16GB", "1x24GB", "16GB+8GB", "4x12GB", "2x8GB", "1x16GB")
REFUSED = 4
PLAN = "runner plan flux --machine "
# Packages, and parts of them that only some of the code needs.
MODULES = ("torch", "torch._dynamo", "torch._meta_registrations", "transformers", "accelerate", "diffusers",
           "runner.planning.suggestions")


def process(*words: str) -> Figures:
    """Seconds from the start of a Python with these words to its end."""
    begin = time.perf_counter()
    ended = subprocess.run([sys.executable, *words], capture_output=True)
    seconds = time.perf_counter() - begin
    assert ended.returncode in (0, REFUSED), ended.stderr.decode()
    return {"seconds": seconds}


def first_step(folder: Path) -> Figures:
    """Seconds from the start of a run to the end of its first step."""
    log, out = folder / "log.jsonl", folder / "picture.png"
    log.unlink(missing_ok=True)
    begin = time.time()
    words = ["--log", str(log), "--out", str(out), "--overwrite"]
    subprocess.run([sys.executable, *RUNNER, *MAKE, *words], check=True, capture_output=True)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return {"seconds": next(event["time"] for event in events if event["kind"] == "step") - begin}


def plans(folder: Path) -> dict[str, Callable[[], Figures]]:
    """A plan of FLUX.1-dev for each of `MACHINES`; its configs and headers go to `folder`."""
    from tests import sparse

    words = (*RUNNER, "plan", "flux", "--model", str(sparse.flux_dev(folder)), "--machine")
    return {f"{PLAN}{cards}": partial(process, *words, cards) for cards in MACHINES}


def imports() -> dict[str, float]:
    """Seconds that each of `MODULES` takes in a plan, with all that it imports first."""
    words = [sys.executable, "-X", "importtime", *RUNNER, "plan", "demo", "--device", "cpu"]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    rows = [line.partition(":")[2].split("|") for line in told.splitlines() if line.startswith("import time:")]
    known = {row[2].strip(): int(row[1]) / 1e6 for row in rows if row[1].strip().isdecimal()}
    return {name: known.get(name, 0.0) for name in MODULES}


def shown(raw: Raw, modules: Mapping[str, float]) -> str:
    """Both Markdown tables."""
    bare = median(raw, "python -c pass", "seconds")
    rows = [[way, spread(raw, way, "seconds", 1.0, 2), f"{median(raw, way, 'seconds') / bare:.1f}"] for way in raw]
    costs = [[f"`{name}`", f"{seconds:.2f}"] for name, seconds in modules.items()]
    return (f"{markdown(['', 's', 'of a bare Python'], rows)}\n\n"
            f"{markdown(['import', 's, with what it imports first'], costs)}")


def main() -> None:
    """Start every way in turns and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="measure this one alone")
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], Figures]] = {
            "python -c pass": partial(process, "-c", "pass"),
            "runner --help": partial(process, *RUNNER, "--help"),
            "import torch": partial(process, "-c", "import torch"),
            "import torch, diffusers, transformers": partial(process, "-c", "import torch, diffusers, transformers"),
            "runner plan demo": partial(process, *RUNNER, "plan", "demo", "--device", "cpu"),
            "runner demo, to its first step": partial(first_step, Path(folder)),
        }
        if said.only is None or said.only.startswith(PLAN):
            ways |= plans(Path(folder) / "flux")
        chosen = {way: call for way, call in ways.items() if said.only in (None, way) or way == "python -c pass"}
        raw = in_turns(chosen, said.repeats, warm=1 if said.only is None else 0)
    modules = imports() if said.only is None else {}
    print(shown(raw, modules))
    write(said.json, raw, imports=modules)


if __name__ == "__main__":
    main()
