"""Qwen-Image keeps its positions in caches of a class, with the card's memory in them: here the model keeps them."""

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from runner import Job, make_plan, run_all
from runner.request import requests_for
from stages.families import FAMILIES
from stages.models.own_caches import keep_by_itself
from tests import tiny_families


def rope(*, own: bool) -> QwenEmbedRope:
    made = QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
    if own:
        keep_by_itself(made)
    return made


def test_what_a_class_keeps_outlives_the_model_and_what_the_model_keeps_does_not() -> None:
    found = []
    for own in (False, True):
        made = rope(own=own)
        found += [made((1, height, 3), device=torch.device("cpu"), max_txt_seq_len=5) for height in (2, 4, 2)]
        gone = weakref.ref(made)
        del made
        assert (gone() is None) is own, "diffusers forgets by itself: the guard can go"
    for theirs, ours in zip(found[:3], found[3:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))


def test_qwen_image_leaves_nothing_on_a_card(tmp_path: Path, cards: Callable[..., list[str]]) -> None:
    model, family = tiny_families.qwen_image(tmp_path / "model"), FAMILIES["qwen-image"]
    requests = [*requests_for("a red circle", family, size=(64, 48), steps=2, seed=1),
                *requests_for("a red circle", family, size=(32, 32), steps=2, seed=1, index=1)]
    devices = cards(40_000_000)
    plan = make_plan(Job("qwen-image", requests, model=model, dtype="float32", devices=devices))
    report = run_all(plan)
    assert [stage.flushed.left for stage in report.stages] == [0, 0, 0]
    # Nor is a second size on top of what was planned for one.
    assert all(stage.peak[devices[0]] <= plan.needs[stage.stage][devices[0]].total for stage in report.stages)
