"""Words that an encoder has no token for, and pictures of nearly one color: told of, also when they are used again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from runner import Job, Request, RunPolicy, make_plan, run_all
from runner.artifacts import FolderStore
from stages.pipeline.decode import LEAST_SPREAD, Decode
from stages.pipeline.prompt_end import PromptReader
from stages.state import State
from tools.demo.captions import known_words
from tools.demo.text import build_clip_tokenizer, build_t5_tokenizer

Tokenizers = tuple[CLIPTokenizer, T5Tokenizer]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    folder = tmp_path_factory.mktemp("tokenizers")
    return build_clip_tokenizer(folder / "1", known_words()), build_t5_tokenizer(folder / "2", known_words())


class Pipe:
    """A pipeline of tokenizers alone, of which no encoder reads."""

    def __init__(self, **tokenizers: Any) -> None:
        self.components = tokenizers
        vars(self).update(tokenizers)


def told(tokenizers: Tokenizers, prompt: str, negative: str | None = None) -> list[str]:
    inputs = {"prompt": prompt} if negative is None else {"prompt": prompt, "negative_prompt": negative}
    pipe = Pipe(tokenizer=tokenizers[0], tokenizer_2=tokenizers[1])
    return list(PromptReader(pipe).unknown(inputs))  # type: ignore[arg-type]


def test_each_unknown_word_is_named_once_with_what_is_known(tokenizers: Tokenizers) -> None:
    (text,) = told(tokenizers, "A fox, a red FOX and a red circle fox above 8k")
    assert text.startswith("text_encoder_2 does not know 'fox', 'FOX', '8k' of the prompt, so the picture will not "
                           "show it; it knows: a, above, ")
    assert all(f", {word}" in text for word in ("circle", "red", "tiny", "yellow"))


@pytest.mark.parametrize("prompt", [
    "", "a red circle", "A Large RED star, at the top.", "green ring to the left of a heart", "something on blue",
])
def test_known_words_are_not_told_of(prompt: str, tokenizers: Tokenizers) -> None:
    assert told(tokenizers, prompt) == []


def test_a_word_that_is_known_in_part_is_named_whole_and_signs_too(tokenizers: Tokenizers) -> None:
    (text,) = told(tokenizers, "red circles!")
    assert "know 'circles', '!' of the prompt" in text
    (text,) = told(tokenizers, "a red circle", "a dragon")
    assert "'dragon' of the negative prompt" in text


def test_an_artifact_that_is_used_again_tells_once_more(flux: Path, tmp_path: Path) -> None:
    def warnings(seed: int, policy: RunPolicy) -> list[str]:
        asked = Request("a \u72d0 fox", 64, 48, 1, 3.5, seed, 32)
        heard: list[str] = []

        def emit(kind: str, data: Mapping[str, Any]) -> None:
            heard.extend([str(data["text"])] if kind == "warning" else [])

        plan = make_plan(Job("flux", [asked], model=flux, devices=["cpu"]))
        run_all(plan, policy, store=FolderStore(tmp_path / "store", warn=heard.append), emit=emit)
        return [text for text in heard if "does not know" in text]

    first = warnings(1, RunPolicy(stop_after="encode"))
    assert len(first) == 1 and first[0].startswith("text_encoder_2 does not know '\u72d0' of the prompt")
    assert warnings(1, RunPolicy()) == warnings(1, RunPolicy()) == warnings(2, RunPolicy()) == first


def test_a_picture_of_nearly_one_color_is_doubted_and_a_faint_one_is_not() -> None:
    doubts = Decode.__dict__["doubts"]
    inputs = {"seed": 7}
    flat = torch.full((64, 64, 3), 120, dtype=torch.uint8)
    flat[::2, ::2] += 2
    (text,) = doubts(None, State({"pixels": flat}), inputs)
    assert text.startswith("the picture of seed 7 is nearly of one color, [120, 120, 120] with a spread of 0.9 of 255")
    dot = flat.clone()
    dot[28:36, 28:36, 1] = 220
    assert list(doubts(None, State({"pixels": dot}), inputs)) == []
    edge = torch.zeros(64, 64, 3, dtype=torch.uint8)
    edge[:, :32, 2] = round(2 * LEAST_SPREAD) + 1
    assert list(doubts(None, State({"pixels": edge}), inputs)) == []
