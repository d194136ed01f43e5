"""What lanes gain over a denoiser on two cards: python -m benchmarks.lanes [--pictures N] [--delay SECONDS].

Two simulated cards hold each kernel for a while, as a real card would be busy with it, so that what the host does
beside it hardly matters. Beside our dealing stands accelerate's: `infer_auto_device_map` with its own hooks.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.table import Figures, Raw, in_turns, markdown, median, spread, write

if TYPE_CHECKING:
    from runner import Plan

LIMIT = 400_000_000


def accelerated(job: "Plan") -> "Plan":
    """The plan with the transformer split by accelerate, half of it on each card."""
    from accelerate import dispatch_model, infer_auto_device_map

    from stages.models.skeleton import new_skeleton
    from stages.placement.sharded import Sharded

    class Accelerated(Sharded):
        def attach(self, model: Any, *given: Any, **more: Any) -> None:
            """Give the model accelerate's hooks instead of ours."""
            dispatch_model(model, dict(self.devices))

    component = job.stages[1].components[0]
    model = new_skeleton(component, job.places["denoise", "transformer"].dtype)
    whole = sum(weight.nbytes for weight in model.parameters())
    split = infer_auto_device_map(model, {0: whole // 2, 1: whole}, no_split_module_classes=model._no_split_modules)
    blocks = job.weights["denoise", "transformer"].blocks
    parts = {name: [block for block in blocks if block.startswith(f"{name}.")] or [name] for name in split}
    devices = {part: job.devices[int(card)] for name, card in split.items() for part in parts[name]}
    placement = Accelerated(job.devices[0], devices)
    place = replace(job.places["denoise", "transformer"], placement=placement, precomputed=frozenset())
    return job.moved("denoise", {"transformer": place})


def measured(job: "Plan", delay: float) -> Figures:
    """Seconds of the denoise of all pictures, without loading."""
    from runner import RunPolicy, run_all
    from runner.artifacts import MemoryStore
    from tests import sim

    store = MemoryStore(warn=print)
    run_all(job, RunPolicy(stop_after="encode"), store=store)
    began = 0.0

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        nonlocal began
        if kind == "loaded":
            sim.delay(per_kernel_seconds=delay)
            began = time.perf_counter()
        elif kind == "flush":
            sim.delay()

    run_all(job, RunPolicy(stop_after="denoise", degrade=False), store=store, emit=emit)
    return {"seconds": time.perf_counter() - began}


def plans(model: Path, pictures: int) -> dict[str, "Plan"]:
    """What is compared."""
    import torch

    from runner import Job, Request, make_plan

    requests = [Request("a red circle", 64, 48, 2, 3.5, seed, 32, index=seed) for seed in range(pictures)]
    place = ["denoise=sharded"]
    jobs = {f"{lanes} lane{'s' * (lanes > 1)}": make_plan(Job("flux", requests, model=model, place=place, lanes=lanes,
                                                              dtype={"": torch.float32}, modulation_table=False))
            for lanes in (1, 2, 3)}
    return {"accelerate's split": accelerated(jobs["1 lane"]), "accelerate's split, 2 lanes": replace(
        accelerated(jobs["1 lane"]), lanes=2), **jobs}


def rows(raw: Raw, pictures: int) -> list[list[object]]:
    """A row per way: its time, and that over the time of one lane."""
    one = median(raw, "1 lane", "seconds")
    return [[way, spread(raw, way, "seconds", 1 / pictures, 2), f"{median(raw, way, 'seconds') / one:.2f}"]
            for way in raw]


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.002, help="seconds that a kernel takes")
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    from tests import sim
    from tests.tiny import flux

    sim.configure([LIMIT, LIMIT])
    with tempfile.TemporaryDirectory() as folder:
        jobs = plans(flux(Path(folder) / "flux", doubles=6, singles=14, heads=5), said.pictures)
        ways = {name: lambda job=job: measured(job, said.delay) for name, job in jobs.items()}
        raw = in_turns(ways, said.repeats, warm=0)
    print(markdown(["way", "s per picture", "of one lane's"], rows(raw, said.pictures)))
    write(said.json, raw, pictures=said.pictures, delay=said.delay)


if __name__ == "__main__":
    main()
