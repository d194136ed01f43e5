"""Command lines by chance on simulated cards, and all that did not end as it should: python -m benchmarks.sweep.

A case is a tiny model, one to four cards of random sizes around what it needs, and random options. It is refused with
a suggestion that then works, or runs within the bytes of its plan and makes the pictures of the unsplit pipeline; see
`tests/sweep/judge.py`. It is known by its number, which is its seed: `--first 1234 --cases 1 --verbose` makes that one
again. The exit code is 1 where there is a fault.
"""

import argparse
import gc
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from contextlib import chdir
from pathlib import Path

# Before torch is imported: one thread, products that do not depend on where in memory an operand lies, no chatter.
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AVX2,STRICT", "TRANSFORMERS_VERBOSITY": "error",
            "DIFFUSERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}

COLLECTED = 20


def main() -> None:
    """Run the cases, and print each fault and how all of them ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--seconds", type=float, help="begin none after so long")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        raise SystemExit(bool(sweep(range(options.first, options.first + options.cases), Path(folder), options)))


def sweep(seeds: range, folder: Path, options: argparse.Namespace) -> int:
    """Run and print the cases with these seeds; how many faults there were."""
    from tests.sweep.case import case_of
    from tests.sweep.judge import PROGRAM, verdict
    from tests.sweep.models import Models

    models, ends, faults, begin = Models(folder), Counter[str](), 0, time.monotonic()
    for done, seed in enumerate(seeds, 1):
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            break
        case = case_of(seed, models)
        ended = verdict(case, models)
        ends[ended.kind] += 1
        if done % COLLECTED == 0:
            # A run takes what is there out of the collector's sight, as its process is to end.
            gc.unfreeze()
            gc.collect()
        faults += bool(ended.fault)
        if ended.fault or options.verbose:
            told = [f"{seed}{' FAULT' if ended.fault else ''} {ended.kind}: {case}",
                    PROGRAM + shlex.join(case.words), *([f"next: {PROGRAM}{ended.command}"] if ended.command else []),
                    *ended.fault.splitlines()]
            print("\n    ".join(told), flush=True)
    ended_so = ", ".join(f"{count} {kind}" for kind, count in ends.most_common())
    print(f"{ends.total()} cases in {time.monotonic() - begin:.0f} s: {ended_so}")
    print(f"faults: {faults}")
    return faults


if __name__ == "__main__":
    if not os.environ.keys() >= SETTINGS.keys():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.sweep", *sys.argv[1:]], os.environ | SETTINGS)
    main()
