"""Damage by chance, and all that was not answered with a plan or an error for people: python -m benchmarks.fuzz.

`--cases 5000` are as many of each of the targets of `tests/fuzz/targets.py`, `--only sd3` of one. A case is known
by its number, which is its seed: `--first 1234 --cases 1` makes that one again. The exit code is 1 where there is a
fault.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.fuzz.isolation import Outcome, is_fault, server
from tests.fuzz.targets import TARGETS


def cases(name: str, seeds: range) -> Iterator[tuple[int, str, Outcome]]:
    """The number, the damage and the outcome of each case of a target."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as temporary:
        whole, damaged = Path(temporary, "whole"), Path(temporary, "damaged")
        target.make(whole)
        with server(whole, name) as running:
            for seed in seeds:
                shutil.copytree(whole, damaged)
                what = target.damage(Random(seed), damaged)
                yield seed, what, running.run(name, damaged)
                shutil.rmtree(damaged)


def main() -> None:
    """Run the cases, and print how they ended and each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    faults = 0
    for name in [options.only] if options.only else TARGETS:
        ends: Counter[str] = Counter()
        slowest = largest = 0.0
        for seed, what, outcome in cases(name, range(options.first, options.first + options.cases)):
            ends[outcome.kind] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.bytes)
            wrong = is_fault(name, outcome)
            faults += wrong
            if wrong or options.verbose:
                print(f"{name} {seed}{' FAULT' if wrong else ''} {outcome.kind} in {outcome.seconds:.1f} s, "
                      f"{outcome.bytes / 2**20:.0f} MiB: {what}\n    {outcome.text}", flush=True)
        ended = ", ".join(f"{count} {kind}" for kind, count in ends.most_common())
        print(f"{name}: {options.cases} cases: {ended}; slowest {slowest:.1f} s, most {largest / 2**20:.0f} MiB")
    print(f"faults: {faults}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
