"""What working in stages costs in time: python -m benchmarks.overhead [--device cpu] [--prompts 1 16].

From nothing loaded to the last picture, with the files in the page cache: diffusers' resident pipeline, its model
offload (where there is a card; without --device a simulated one) called prompt by prompt, and a staged run with a new
store in a folder. The model is a FLUX of random numbers in float32; all must make the same pictures, bit for bit.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.table import Figures, Raw, in_turns, markdown, median, spread, write

if TYPE_CHECKING:
    import numpy as np

    Pictures = list[np.ndarray[Any, Any]]

SIZE, TOKENS, GUIDANCE = 64, 32, 3.5


def piped(model: Path, count: int, steps: int, place: Callable[[Any], object]) -> "tuple[Pictures, Figures]":
    """Pictures of the classic pipeline, one prompt at a time, after `place` has put it somewhere."""
    import torch
    from diffusers import FluxPipeline

    begin = time.perf_counter()
    pipeline = FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline)
    made = [pipeline(f"picture {seed}", width=SIZE, height=SIZE, num_inference_steps=steps, guidance_scale=GUIDANCE,
                     max_sequence_length=TOKENS, generator=torch.Generator().manual_seed(seed),
                     output_type="np").images[0] for seed in range(count)]
    return [(picture * 255).round().astype("uint8") for picture in made], {"seconds": time.perf_counter() - begin}


def staged(model: Path, device: str, count: int, steps: int) -> "tuple[Pictures, Figures]":
    """Pictures of a staged run, and the seconds of its parts."""
    import torch

    from runner import Job, Request, make_plan, run_all
    from runner.artifacts import open_store

    requests = [Request(f"picture {seed}", SIZE, SIZE, steps, GUIDANCE, seed, TOKENS, index=seed)
                for seed in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        plan = make_plan(Job("flux", requests, model=model, devices=[device], dtype={"": torch.float32}))
        planned = time.perf_counter()
        report = run_all(plan, store=open_store(folder, warn=print))
        made = [picture.pixels for picture in report.pictures]
        done = time.perf_counter()
    parts = {"plan": planned - begin, **dict.fromkeys(("table", "load", "compute", "save", "flush"), 0.0)}
    for stage in report.stages:
        for part, seconds in stage.seconds.items():
            parts[part] += seconds
    return made, {"seconds": done - begin, **parts, "other": done - begin - sum(parts.values())}


def compared(model: Path, device: str, count: int, steps: int, repeats: int) -> Raw:
    """Each way in turns; the pictures of all must be the same."""
    import numpy as np

    seen: list[Pictures] = []

    def same(made: "tuple[Pictures, Figures]") -> Figures:
        seen.append(made[0])
        assert all(np.array_equal(one, other) for one, other in zip(seen[0], made[0], strict=True)), "other pictures"
        return made[1]

    ways: dict[str, Callable[[], Figures]] = {
        "resident pipeline": lambda: same(piped(model, count, steps, lambda pipeline: pipeline.to(device)))}
    if device != "cpu":
        ways["model offload"] = lambda: same(
            piped(model, count, steps, lambda pipeline: pipeline.enable_model_cpu_offload(device=device)))
    ways["stages"] = lambda: same(staged(model, device, count, steps))
    return in_turns(ways, repeats)


def rows(count: int, raw: Raw) -> list[list[object]]:
    """A row per way: its time, and that over the resident pipeline's."""
    resident = median(raw, "resident pipeline", "seconds")
    return [[way, count, spread(raw, way, "seconds", digits=2), f"{median(raw, way, 'seconds') / resident:.2f}"]
            for way in raw]


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--heads", type=int, default=32, help="width of the model that is made, in heads of 16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    if said.device is None:
        from tests import sim

        sim.configure([4_000_000_000])
    import diffusers  # noqa: F401

    device = said.device or "sim:0"
    # As the command line does: flushes look through everything that is not frozen.
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        from tests.tiny import flux

        model = flux(Path(folder) / "flux", doubles=4, singles=8, heads=said.heads)
        found = {count: compared(model, device, count, said.steps, said.repeats) for count in said.prompts}
    print(markdown(["way", "prompts", "s", "of the resident pipeline's"],
                   [row for count, raw in found.items() for row in rows(count, raw)]))
    parts: Sequence[str] = [part for part in found[said.prompts[0]]["stages"][0] if part != "seconds"]
    split = [[count, *(f"{median(raw, 'stages', part):.2f}" for part in parts)] for count, raw in found.items()]
    print()
    print(markdown(["stages: prompts", *(f"{part} s" for part in parts)], split))
    write(said.json, found, device=device, steps=said.steps)


if __name__ == "__main__":
    main()
