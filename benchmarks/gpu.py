"""A full-size FLUX.1-dev on one card, beside what a user would pick instead: python -m benchmarks.gpu [--tiny].

Makes a checkpoint of random numbers (34 GB in --folder, where a second run finds it), measures the two floors of this
machine, and then makes the same picture in each way, each in a process of its own under its own limit of memory. After
each way the table and the JSON file are written anew; what no longer fits in --minutes is left out, and says so.
--tiny does all of it in this process with a tiny model on a simulated card, to see that it works.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu_tables import Facts, tables
from benchmarks.gpu_ways import measure
from benchmarks.gpu_workload import WAYS, Notes, Way, Workload
from benchmarks.table import write

Start = Callable[[Way, float], Facts]
# Seconds for the table, and most that the checkpoint and the floors may take.
LAST, PREPARING = 5.0, 300.0
TINY_UNIT = 412_000


def compare(
    ways: Sequence[Way], start: Start, left: Callable[[], float], keep: Callable[[Facts], None]
) -> Facts:
    """What `start` finds of each way within the seconds that are `left`; `keep` gets all of it after each."""
    found: Facts = {}
    for way in ways:
        seconds = left()
        if seconds < way.least:
            found[way.name] = {"status": "skipped", "why": f"{max(0, seconds):.0f} s left, needs {way.least:.0f}"}
        else:
            found[way.name] = start(way, min(seconds, way.most))
        keep(found)
    return found


def started(notes: Path, seconds: float, *options: str) -> Facts:
    """What a process of this module with these options notes within so many seconds, and how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", *options, "--notes", str(notes)]
    # Nothing is fetched: the checkpoint is here, and asking a hub about it can only take time.
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    why = f"ended after {seconds:.0f} s"
    try:
        done = subprocess.run([*command, "--until", str(time.time() + seconds)], timeout=seconds, env=quiet,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        why = f"exit code {done.returncode}: {' '.join(done.stdout.splitlines()[-1:])}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        pass
    known = json.loads(notes.read_text()) if notes.exists() else {}
    return settled(known, why) if why else known


def settled(known: Facts, why: str) -> Facts:
    """The notes of a process that did not end by itself."""
    status = str(known.get("status", "starting"))
    return known | {"status": "made" if status.startswith("made") else f"ended while {status}", "why": why}


def prepare(folder: Path, work: Workload, notes: Notes, width: int = 8192, size: int = 2**30) -> None:
    """Note the card, the arithmetic of a step and the rates of this machine."""
    from benchmarks.floors import operations, rates
    from stages.machine import probe

    (card,) = probe([work.device]).devices
    notes.add(card=f"{card.label} ({card.total / 2**30:.1f} GiB)",
              operations=operations(folder, work.side, work.tokens))
    notes.add(rates=rates(work.device, work.dtype, width, size))


def keeper(said: argparse.Namespace, floors: Facts) -> Callable[[Facts], None]:
    """What writes both files anew: the table beside the JSON file."""
    def keep(found: Facts) -> None:
        if said.json is not None:
            raw = {name: [known] for name, known in found.items()}
            write(said.json, raw, floors=floors, side=said.side, steps=said.steps, date=time.strftime("%Y-%m-%d"))
            Path(said.json).with_suffix(".md").write_text(tables(found, floors, said.steps) + "\n")
        if found:
            name, known = list(found.items())[-1]
            print(f"{name}: {known['status']} {known.get('why', '')}".rstrip(), file=sys.stderr, flush=True)

    return keep


def full(said: argparse.Namespace, ways: Sequence[Way], folder: Path) -> tuple[Facts, Facts]:
    """Each way in a process of its own, after the one that makes the checkpoint."""
    until = time.time() + 60 * said.minutes - LAST
    shared = ["--folder", str(folder), "--side", str(said.side), "--steps", str(said.steps)]
    with tempfile.TemporaryDirectory() as kept:
        floors = started(Path(kept) / "floors.json", min(PREPARING, until - time.time()), "--prepare", *shared)
        if "checkpoint" not in floors:
            sys.exit(f"there is no checkpoint: {floors.get('why')}")
        print(f"checkpoint and floors: {json.dumps(floors)}", file=sys.stderr, flush=True)
        keep = keeper(said, floors)
        keep({})
        return compare(ways, lambda way, seconds: started(
            Path(kept) / f"{WAYS.index(way)}.json", seconds, "--way", way.name, *shared,
        ), lambda: until - time.time(), keep), floors


def tiny(said: argparse.Namespace, ways: Sequence[Way], folder: Path) -> tuple[Facts, Facts]:
    """Each way in this process, on simulated cards."""
    import torch

    from benchmarks.full_size import fill
    from tests import sim
    from tests.tiny import flux

    said.side, said.steps = 64, 3

    def count(work: Callable[[], object]) -> dict[str, int]:
        sim.reset_copied()
        work()
        seen = sim.copied()
        return {"to card": seen.get(("cpu", "sim:0"), 0), "to host": seen.get(("sim:0", "cpu"), 0)}

    work = Workload(flux(folder, heads=8), "sim:0", torch.float32, said.side, said.steps, 32, TINY_UNIT, count=count)
    sim.configure([2**30])
    floors = Notes()
    floors.add(checkpoint={"bytes": fill(folder, "cpu")})
    prepare(folder, work, floors, width=64, size=2**20)

    def start(way: Way, seconds: float) -> Facts:
        notes = Notes()
        # What an error of the way before still holds.
        gc.collect()
        sim.configure([way.limit * TINY_UNIT if way.limit else 2**30])
        torch.accelerator.reset_peak_memory_stats(work.device)
        measure(way, work, notes)
        return notes.known

    return compare(ways, start, lambda: 1000.0, keeper(said, floors.known)), floors.known


def work(said: argparse.Namespace) -> None:
    """What a process is started for: the checkpoint and the floors, or one way."""
    import torch

    from benchmarks.copies import counter
    from benchmarks.full_size import build
    from stages.machine import probe

    card = probe().devices[0]
    if card.is_host:
        sys.exit("there is no card here -> --tiny runs on a simulated one")
    work, notes = Workload(said.folder, card.name, torch.bfloat16, said.side, said.steps, until=said.until,
                     count=counter()), Notes(said.notes)
    if said.prepare:
        begin = time.perf_counter()
        facts = build(said.folder, card.name)
        notes.add(checkpoint=facts, building=time.perf_counter() - begin)
        prepare(said.folder, work, notes)
    else:
        import diffusers  # noqa: F401

        # As the command line does: flushes look through everything that is not frozen.
        gc.collect()
        gc.freeze()
        measure(next(way for way in WAYS if way.name == said.transfer), work, notes)


def main() -> None:
    """Compare all ways and print two tables."""
    names = [way.name for way in WAYS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a simulated card")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept; else it is removed")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WAY", help=", ".join(names))
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--json", help="file for the raw figures; the tables go beside it")
    for name, kind in {"--way": str, "--notes": Path, "--until": float}.items():
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.notes is not None:
        work(said)
        return
    with tempfile.TemporaryDirectory() as folder:
        ways = [way for way in WAYS if way.name in said.only]
        found, floors = (tiny if said.tiny else full)(said, ways, said.folder or Path(folder))
    print(tables(found, floors, said.steps))


if __name__ == "__main__":
    main()
