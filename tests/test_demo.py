"""The demo checkpoint draws what the prompt says, judged by its pixels; made by the project's own runner."""

import dataclasses
import re
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
from tools.demo.captions import known_words
from tools.demo.judge import Score, nearly_constant, pictures_of, score
from tools.demo.prompts import SEEDS, SHOWN, Prompt, held_out_prompts, partial_prompts, shown_prompts
from tools.demo.shapes import COLORS, SHAPES

DEMO = FAMILIES["demo"]
ROOT = Path(__file__).parent.parent


def judged(prompts: list[Prompt], pictures: Iterable[Image.Image]) -> Score:
    result = score(prompts, pictures)
    print(f"{result.passed} of {result.total}: {result.right}")
    return result


@pytest.mark.parametrize(("prompts", "least", "blank"), [
    pytest.param(held_out_prompts()[0][::3], 33, 0, id="one shape"),
    pytest.param(held_out_prompts()[1][::3], 16, 0, id="two shapes"),
    pytest.param(partial_prompts()[::20], 25, 2, id="with something left open"),
    pytest.param(shown_prompts()[::SEEDS], 18, 0, id="shown in the project"),
])
def test_prompts_that_training_never_saw(prompts: list[Prompt], least: int, blank: int) -> None:
    """By diffusers' pipeline, which takes ten at a time; that the runner's pictures are the same is tested below.

    Those of some of the prompts; `python -m tools.demo.judge` judges all.
    """
    pictures = list(pictures_of(CHECKPOINT, prompts))
    result = judged(prompts, pictures)
    assert result.passed >= least, result.wrong
    assert sum(map(nearly_constant, pictures)) <= blank


def demo_prompts(text: str) -> set[str]:
    """What is in quotes or indented on a line, and made of the demo's words alone, a color or a shape among them."""
    words, naming = set(known_words()), {*COLORS, *SHAPES}
    pairs = re.findall(r'\\?"([A-Za-z ,]+?)\\?"|^    ([A-Za-z ,]+)$', text, re.MULTILINE)
    found = {(quoted or alone).strip().lower() for quoted, alone in pairs}
    return {each for each in found if " " in each and set(each.replace(",", "").split()) <= words
            and naming & set(each.split())}


def test_all_that_the_project_shows_of_the_demo_is_judged() -> None:
    pages = [path for pattern in ("*.md", "docs/*.md", "notebooks/*.ipynb", "benchmarks/*.py", "runner/**/*.py",
                                  "stagerun/*.py", "runner/demo/*.md") for path in ROOT.glob(pattern)]
    shown = {prompt: path.name for path in pages for prompt in demo_prompts(path.read_text())}
    assert len(shown) > 10
    assert {prompt: page for prompt, page in shown.items() if prompt not in SHOWN} == {}


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
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]
