"""Fifty pictures of the demo checkpoint on Ray with a denoise worker killed on the way, beside one process.

python -m benchmarks.cluster [--pictures N] [--json FILE]
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.table import markdown, write

if TYPE_CHECKING:
    from runner import Report, Request


def asked(count: int) -> "list[Request]":
    """The prompts that the demo is scored on, the ones with two shapes first, a seed each."""
    from runner.request import requests_for
    from stages.families import FAMILIES
    from tools.demo.prompts import held_out_prompts

    texts = [prompt.text for kind in reversed(held_out_prompts()) for prompt in kind][:count]
    return [replace(requests_for(text, FAMILIES["demo"], seed=at)[0], index=at) for at, text in enumerate(texts)]


class Killer:
    """An emit that kills the denoise worker once a fifth of the pictures is done; `seen` are all that worked."""

    def __init__(self, after: int) -> None:
        self.seen: list[str] = []
        self.killed = ""
        self._after, self._errands = after, 0

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        worker = data.get("workers", {}).get("denoise")
        if worker is None:
            return
        self._errands += 1
        self.seen += [] if worker in self.seen else [worker]
        if not self.killed and int(data["what"].split()[0]) >= self._after:
            self.killed = worker
            os.kill(int(worker.split()[-1]), signal.SIGKILL)


def equal(made: "Report", alone: "Report") -> int:
    """How many pictures are equal, bit for bit."""
    return sum(bool((one.pixels == other.pixels).all()) and one.index == other.index
               for one, other in zip(made.pictures, alone.pictures, strict=True))


def main() -> None:
    """Make the pictures both ways and print what came of it."""
    from runner import Job, make_plan, run_all, run_on_ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--json", help="a file for the raw figures")
    said = parser.parse_args()
    requests = asked(said.pictures)
    begin = time.perf_counter()
    alone = run_all(make_plan(Job("demo", requests, devices=["cpu"])))
    local = time.perf_counter() - begin
    killer = Killer(len(requests) // 5)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        made = run_on_ray(Job("demo", requests, store=Path(folder) / "store", devices=["cpu"]), emit=killer)
        far = time.perf_counter() - begin
        same = equal(made, alone)
    facts = {"pictures": len(made.pictures), "equal": same, "failures": len(made.failures),
             "workers": len(killer.seen), "killed": int(bool(killer.killed)), "time": far / local}
    head = ["pictures", "equal, bit for bit", "failures", "denoise workers", "killed", "time, of one process"]
    print(markdown(head, [[*list(facts.values())[:-1], f"{facts['time']:.1f}"]]))
    write(said.json, facts, requests=len(requests))


if __name__ == "__main__":
    main()
