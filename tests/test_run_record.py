"""What a real run on two cards leaves in the store is enough for its report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from runner import Job, Request, RunPolicy, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.media.previews import NOTHING_YET, strips
from runner.reports.page import page
from tests import tiny

Cards = Callable[..., list[str]]
ASKED = Request("a red <circle>", 64, 48, 4, 3.5, 7, 32)
UNKNOWN = ("text_encoder_2 does not know '<', '>' of the prompt, so the picture will not show it; it knows: "
           "b, c, dog, l, o, s, t")


def test_a_run_on_two_cards_can_be_reported_from_the_store_alone(tmp_path: Path, cards: Cards) -> None:
    model = tiny.flux(tmp_path / "flux", doubles=6, singles=12, heads=7)
    (vae,) = (model / "vae").glob("*.safetensors")
    save_file({**load_file(vae), "ema.decay": torch.ones(1)}, vae, {"format": "pt"})
    unread = "the model has no use for what the files of vae hold besides its weights: ema.decay"
    devices = cards(12_000_000, 12_000_000)
    job, store = make_plan(Job("flux", [ASKED], model=model, dtype={"": torch.float32})), MemoryStore(warn=print)
    first = run_all(job, RunPolicy(preview=1), store=store)
    record: dict[str, Any] = store.load_run(first.run)
    assert record["warnings"] == [unread, UNKNOWN, NOTHING_YET] and record["previews"] == {}
    timeline = record["timeline"]
    assert timeline["devices"] == devices and timeline["peaks"]["denoise"] == first.stages[1].peak
    for at, device in enumerate(devices):
        steps = [sample[3][at] for sample in timeline["samples"] if sample[2] == "step"]
        held = sum(record["layout"]["denoise"][device]["transformer"].values())
        assert len(steps) == 4 and all(held <= used <= first.stages[1].peak[device] for used in steps)
        assert [sample[3][at] for sample in timeline["samples"] if sample[2] == "flush"] == [0, 0, 0]
    spans = {(span["stage"], span["part"]): span["busy"] for span in timeline["spans"]}
    for stage in first.stages:
        assert all(abs(spans[stage.stage, part] - stage.seconds[part]) < 1e-9 for part in ("load", "compute", "flush"))
    again = run_all(job, RunPolicy(preview=1, from_stage="denoise", sample_memory=True), store=store)
    record = store.load_run(again.run)
    (strip,) = strips(record, store).values()
    # What encode warned of is told again, as what it made is used again.
    assert record["warnings"] == [unread, UNKNOWN] and [step for step, _ in strip] == [1, 2, 3, 4]
    assert all(shot.shape == (12, 16, 3) for _, shot in strip)
    # Where the noise would lead looks more and more like where it leads.
    last = strip[-1][1].astype(float)
    off = [np.abs(shot - last).mean() for _, shot in strip]
    assert off[0] > off[2] > off[3] == 0
    text = page(again.run, record, store)
    assert "Denoising, step by step" in text and "transformer_blocks" in text and "a red &lt;circle&gt;" in text
