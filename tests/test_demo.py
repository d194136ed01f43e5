"""The demo checkpoint draws what the prompt says, judged by its pixels; made by the project's own runner."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from PIL import Image

from runner import Report, Request, make_plan, run_all
from runner.artifacts import FolderStore, MemoryStore
from runner.demo import CHECKPOINT
from runner.demo.judge import Score, score
from runner.demo.scenes import Prompt, exam_prompts
from runner.request import ask
from stages.families import FAMILIES

DEMO = FAMILIES["demo"]


def made(prompts: list[Prompt]) -> Report:
    asked = [ask(prompt.text, DEMO, seed=prompt.seed)[0] for prompt in prompts]
    requests = [dataclasses.replace(request, index=index) for index, request in enumerate(asked)]
    return run_all(make_plan("demo", requests, devices=["cpu"]))


def judged(prompts: list[Prompt]) -> Score:
    result = score(prompts, (Image.fromarray(picture.pixels) for picture in made(prompts).pictures))
    print(f"{result.passed} of {result.of}: {result.right}")
    return result


def test_one_object_prompts_held_out_of_training() -> None:
    result = judged(exam_prompts()[0])
    assert result.of == 100 and result.passed >= 90, result.wrong


def test_two_object_prompts_held_out_of_training() -> None:
    result = judged(exam_prompts()[1])
    assert result.of == 50 and result.passed >= 35, result.wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_demo_staged_equals_the_demo_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    asked = Request("a large red circle on a blue background", 64, 64, 2, None, 5, DEMO.text_tokens)
    job = make_plan("demo", [asked], dtype={"": dtype}, devices=["cpu"])
    pipe = ModularPipeline.from_pretrained(str(CHECKPOINT))
    pipe.load_components(dtype=dtype)
    whole = np.asarray(pipe(
        prompt=asked.prompt, width=64, height=64, num_inference_steps=2, max_sequence_length=asked.text_tokens,
        generator=torch.Generator("cpu").manual_seed(5), output="images",
    )[0])
    for store in (MemoryStore(warn=print), FolderStore(tmp_path / "store", warn=print)):
        run_all(job, store=store, stop_after="denoise")
        resumed = run_all(job, store=store)
        assert [stage.ran for stage in resumed.stages] == [0, 0, 1]
        assert np.array_equal(resumed.pictures[0].pixels, whole)
    assert np.array_equal(run_all(job).pictures[0].pixels, whole)


def test_the_checkpoint_is_small_enough_to_ship() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".model"}
