"""The demo checkpoint draws what the prompt says, judged by its pixels; made by the project's own runner."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from PIL import Image

from runner import Job, Request, RunPolicy, make_plan, run_all
from runner.artifacts import FolderStore, MemoryStore
from runner.demo import CHECKPOINT
from runner.request import requests_for
from stages.families import FAMILIES
from tools.demo.judge import Score, pictures_of, score
from tools.demo.prompts import Prompt, held_out_prompts

DEMO = FAMILIES["demo"]


def judged(prompts: list[Prompt], pictures: Iterable[Image.Image]) -> Score:
    result = score(prompts, pictures)
    print(f"{result.passed} of {result.total}: {result.right}")
    return result


def test_one_object_prompts_held_out_of_training() -> None:
    """By diffusers' pipeline, which takes ten at a time; that the runner's pictures are the same is tested below."""
    prompts = held_out_prompts()[0]
    result = judged(prompts, pictures_of(CHECKPOINT, prompts))
    assert result.total == 100 and result.passed >= 90, result.wrong


def test_two_object_prompts_held_out_of_training() -> None:
    prompts = held_out_prompts()[1]
    result = judged(prompts, pictures_of(CHECKPOINT, prompts))
    assert result.total == 50 and result.passed >= 35, result.wrong


def test_the_runner_draws_what_held_out_prompts_say() -> None:
    prompts = [prompt for kind in held_out_prompts() for prompt in kind[:6]]
    asked = [requests_for(prompt.text, DEMO, seed=prompt.seed)[0] for prompt in prompts]
    requests = [dataclasses.replace(request, index=index) for index, request in enumerate(asked)]
    made = run_all(make_plan(Job("demo", requests, devices=["cpu"]))).pictures
    result = judged(prompts, (Image.fromarray(picture.pixels) for picture in made))
    assert result.total == 12 and result.passed >= 10, result.wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_demo_staged_equals_the_demo_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    asked = Request("a large red circle on a blue background", 64, 64, 2, None, 5, DEMO.text_tokens)
    job = make_plan(Job("demo", [asked], dtype={"": dtype}, devices=["cpu"]))
    pipe = ModularPipeline.from_pretrained(str(CHECKPOINT))
    pipe.load_components(dtype=dtype)
    whole = np.asarray(pipe(
        prompt=asked.prompt, width=64, height=64, num_inference_steps=2, max_sequence_length=asked.text_tokens,
        generator=torch.Generator("cpu").manual_seed(5), output="images",
    )[0])
    for store in (MemoryStore(warn=print), FolderStore(tmp_path / "store", warn=print)):
        run_all(job, RunPolicy(stop_after="denoise"), store=store)
        resumed = run_all(job, store=store)
        assert [stage.ran for stage in resumed.stages] == [0, 0, 1]
        assert np.array_equal(resumed.pictures[0].pixels, whole)
    assert np.array_equal(run_all(job).pictures[0].pixels, whole)


def test_the_checkpoint_is_small_enough_to_ship() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".model"}
