"""The most bytes on a card by stage, of ours and of what a user would pick instead: python -m benchmarks.memory.

One picture from one checkpoint in every way, on simulated cards, which count every byte; a model of random numbers is
made in float32 unless --model names another. Peaks belong to the stage in which they came; what the pipelines of
diffusers do is told apart where the denoise loop is set up and where the VAE is called.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from benchmarks.table import Figures, markdown, write
from benchmarks.tutorial import tutorial
from runner import Job, Request, make_plan, run_all

PROMPT, STEPS, GUIDANCE, SEED = "a red circle", 2, 3.5, 7
STAGES = ("encode", "denoise", "decode")
ROOM = 16_000_000_000
Setting = Callable[[Any], object]


class Peaks:
    """The most bytes on each card by stage; a stage lasts until the next one begins."""

    def __init__(self, cards: Sequence[str]) -> None:
        self.cards, self.stage = cards, STAGES[0]
        self.found: dict[str, int] = {}
        self._restart()

    def begin(self, stage: str) -> None:
        """End the stage before this one, unless this one has begun already."""
        if stage != self.stage:
            self.end()
            self.stage = stage
            self._restart()

    def end(self) -> None:
        """Keep the peaks of the stage."""
        for card in self.cards:
            peak = torch.accelerator.max_memory_allocated(card)
            name = f"{self.stage} {card}"
            self.found[name] = max(peak, self.found.get(name, 0))

    def _restart(self) -> None:
        for card in self.cards:
            torch.accelerator.reset_peak_memory_stats(card)


def piped(model: Path, size: tuple[int, int], tokens: int, cards: Sequence[str], setting: Setting | None,
          **options: Any) -> Figures:
    """The peaks of a pipeline of diffusers; `setting` is done to it once it is loaded."""
    peaks = Peaks(cards)
    pipeline = FluxPipeline.from_pretrained(str(model), torch_dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    if setting is not None:
        setting(pipeline)
    with announced(pipeline.scheduler, "set_timesteps", lambda: peaks.begin("denoise")), \
            announced(pipeline.vae, "decode", lambda: peaks.begin("decode")), torch.no_grad():
        pipeline(PROMPT, width=size[0], height=size[1], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                 max_sequence_length=tokens, generator=torch.Generator("cpu").manual_seed(SEED))
    peaks.end()
    return peaks.found


@contextmanager
def announced(part: Any, method: str, tell: Callable[[], None]) -> Iterator[None]:
    """Tell of every call of a method of one object."""
    call = getattr(part, method)

    # The pipeline looks at the signature of some.
    @wraps(call)
    def outer(*args: Any, **kwargs: Any) -> Any:
        tell()
        return call(*args, **kwargs)

    setattr(part, method, outer)
    try:
        yield
    finally:
        delattr(part, method)


def ours(model: Path, size: tuple[int, int], tokens: int, cards: Sequence[str], **options: Any) -> Figures:
    """The peaks of a run in stages."""
    request = Request(PROMPT, *size, STEPS, GUIDANCE, SEED, tokens)
    plan = make_plan(Job("flux", [request], model=model, devices=cards, dtype={"": torch.float32}, **options))
    return {f"{stage.stage} {card}": peak for stage in run_all(plan).stages for card, peak in stage.peak.items()}


def by_recipe(model: Path, size: tuple[int, int], tokens: int, cards: Sequence[str]) -> Figures:
    """The peaks of the guides' sharding recipe, on cards that are each told to be smaller than the transformer."""
    caps = dict.fromkeys(cards, weights(model, "transformer") * 3 // 4)
    figures = tutorial(model, caps, PROMPT, size=size, steps=STEPS, guidance=GUIDANCE, tokens=tokens, seed=SEED,
                       dtype=torch.float32)[1]
    return {f"{part} {card}": peak for part, peaks in figures.parts.items() for card, peak in peaks.items()}


def weights(model: Path, component: str = "*") -> int:
    """The bytes of a component's files, or of all."""
    return sum(file.stat().st_size for file in model.glob(f"{component}/*.safetensors"))


def ways(
    model: Path, size: tuple[int, int], tokens: int, one: str, two: Sequence[str]
) -> dict[str, Callable[[], Figures]]:
    """What is measured: on one card, and then on two."""
    card = torch.device(one)
    pipe = partial(piped, model, size, tokens)
    run = partial(ours, model, size, tokens)
    group = {"onload_device": card, "offload_device": torch.device("cpu")}
    limits = {at: ROOM for at, _ in enumerate(two)}
    sharded = ["denoise=sharded"]
    return {
        "FluxPipeline, resident": partial(pipe, [one], lambda pipeline: pipeline.to(one)),
        "enable_model_cpu_offload": partial(
            pipe, [one], lambda pipeline: pipeline.enable_model_cpu_offload(device=one)),
        "group offload, leaves": partial(
            pipe, [one], lambda pipeline: pipeline.enable_group_offload(**group, offload_type="leaf_level")),
        "enable_sequential_cpu_offload": partial(
            pipe, [one], lambda pipeline: pipeline.enable_sequential_cpu_offload(device=one)),
        "ours, no modulation table": partial(run, [one], modulation_table=False),
        "ours": partial(run, [one]),
        "ours, half of it waits": partial(run, [one], allow_offload="cpu", place=["denoise=streamed"],
                                          max_memory=f"{weights(model, 'transformer') // 2}B"),
        'device_map="balanced"': partial(pipe, two, None, device_map="balanced", max_memory=limits),
        "the guides' recipe": partial(by_recipe, model, size, tokens, two),
        "ours on two, no modulation table": partial(run, two, modulation_table=False, place=sharded),
        "ours on two": partial(run, two, place=sharded),
    }


def measured(way: Callable[[], Figures]) -> Figures:
    """The peaks of one way, which begins with nothing on the cards."""
    gc.collect()
    torch.accelerator.empty_cache()
    left = sum(torch.accelerator.memory_allocated(at) for at in range(torch.accelerator.device_count()))
    assert left == 0, f"{left} bytes of the way before are still on the cards"
    return way()


def shown(raw: Mapping[str, Figures], whole: int) -> str:
    """The Markdown table; the peaks are parts of all weights."""
    rows = []
    for way, peaks in raw.items():
        cards = sorted({name.partition(" ")[2] for name in peaks})
        rows.append([way, len(cards), *(" + ".join(f"{peaks.get(f'{stage} {card}', 0) / whole:.0%}" for card in cards)
                                        for stage in STAGES), f"{max(peaks.values()) / whole:.0%}"])
    return markdown(["", "cards", *STAGES, "most on a card"], rows)


def main() -> None:
    """Measure every way once, for bytes are the same every time, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--heads", type=int, default=24, help="width of the model that is made, in heads of 16")
    parser.add_argument("--side", type=int, default=64, help="pixels along a side of the picture")
    parser.add_argument("--only", action="append", default=[], help="ways with this in their names; may be repeated")
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    from tests import sim

    sim.configure([ROOM, ROOM])
    with tempfile.TemporaryDirectory() as folder:
        from tests.tiny import flux

        model = said.model or flux(Path(folder) / "flux", doubles=4, singles=8, heads=said.heads, text=16 * said.heads,
                                   text_layers=6)
        whole = weights(model)
        found = ways(model, (said.side, said.side), 32, "sim:0", ["sim:0", "sim:1"])
        chosen = [name for name in found if not said.only or any(part in name for part in said.only)]
        raw = {name: measured(found[name]) for name in chosen}
        sizes = {name: weights(model, name) for name in ("text_encoder_2", "transformer")}
    print(f"{shown(raw, whole)}\n\nParts of {whole / 1e6:.0f} MB of weights, of which T5 has "
          f"{sizes['text_encoder_2'] / whole:.0%} and the transformer {sizes['transformer'] / whole:.0%}.")
    write(said.json, raw, bytes=whole, weights=sizes, side=said.side)


if __name__ == "__main__":
    main()
