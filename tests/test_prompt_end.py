"""A prompt whose end no encoder sees is told of, and no other: held against what the embeddings depend on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from runner import Job, Request, make_plan
from stages.models.checkpoint import find
from stages.pipeline.split import split
from stages.pipeline.stage import Loaded
from stages.state import State
from tests import tiny_families
from tests.staging import on_host

INPUTS: dict[str, Any] = {"prompt": "", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 1,
                          "max_sequence_length": 64}
SHORT, LONG = "a red circle on a blue square", "\U0001f98a" * 9
# Qwen-Image is not here: it drops as many tokens as its template has, and that of a tokenizer of letters has more.
MODELS: dict[str, tuple[Callable[[Path], object], int]] = {
    "z-image": (tiny_families.z_image, 64), "flux2-klein": (tiny_families.klein, 64),
    "flux2": (tiny_families.flux2, 224),
}


def encoded(loaded: Loaded, prompt: str, tokens: int = 64) -> tuple[State, list[str]]:
    """The embeddings of a prompt, and the warnings."""
    heard: list[str] = []
    state = loaded.run(State(), {**INPUTS, "prompt": prompt, "max_sequence_length": tokens},
                       lambda kind, data: heard.append(str(data["text"])) if kind == "warning" else None)
    return state, heard


def tokenizers(model: Path) -> list[Any]:
    return [AutoTokenizer.from_pretrained(model / name) for name in ("tokenizer", "tokenizer_2")]


def equal(one: State, other: State) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return all(ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", MODELS)
def test_a_warning_comes_exactly_where_the_last_letter_changes_nothing(family: str, tmp_path: Path) -> None:
    make, tokens = MODELS[family]
    make(tmp_path / "model")
    stage = split(find(tmp_path / "model"), list(INPUTS))[0]
    with stage.loaded(on_host([stage])) as loaded:

        def unseen(length: int) -> bool:
            # Letters are the tokens of these tokenizers.
            text = ("the quick brown fox jumps over a lazy dog and " * 8)[:length]
            (state, heard), (other, _) = encoded(loaded, f"{text}a", tokens), encoded(loaded, f"{text}z", tokens)
            assert bool(heard) == equal(state, other), (length, heard)
            assert not heard or ("does not see its end: " in heard[0] and heard[0].endswith("a'"))
            return bool(heard)

        low, high = 2, tokens + 10
        assert not unseen(low) and unseen(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if unseen(middle) else (middle, high)
        # The border is in front of the prompt's own length: the template takes its part.
        assert high < tokens - 3 and all(unseen(high + more) for more in range(4))


def test_a_long_negative_prompt_is_told_of_too(tmp_path: Path) -> None:
    tiny_families.qwen_image(tmp_path / "model")
    stage = split(find(tmp_path / "model"), [*INPUTS, "negative_prompt"])[0]
    heard: list[str] = []
    with stage.loaded(on_host([stage])) as loaded:
        loaded.run(State(), {**INPUTS, "prompt": "a fox", "negative_prompt": "x" * 80},
                   lambda kind, data: heard.append(str(data.get("text"))))
    assert heard == [f"the negative prompt is too long for the model, which does not see its end: {'x' * 16!r}"]


def test_in_flux_t5_reads_on_where_clip_ends(flux: Path) -> None:
    stage = split(find(flux), list(INPUTS))[0]
    with stage.loaded(on_host([stage])) as loaded:
        assert not encoded(loaded, "a fox " * 10)[1]
        assert "does not see its end" in encoded(loaded, "a fox and a dog " * 60)[1][0]


def test_the_longest_prompt_is_that_of_most_tokens(flux: Path) -> None:
    """Not of most bytes: a letter of four bytes may be one token."""
    encode = split(find(flux), list(INPUTS))[0]
    short, long = SHORT, LONG
    tokens = [sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for tokenizer in tokenizers(flux))
              for text in (short, long)]
    assert len(long.encode()) > len(short.encode()) and tokens[0] > tokens[1]
    assert encode.longest([long, short, "x"]) == short and encode.longest(iter(["x"])) == "x"


def test_a_batch_is_rehearsed_with_its_most_tokens(flux: Path) -> None:
    requests = [Request(prompt, 64, 64, 1, 3.5, 1, 32) for prompt in (LONG, SHORT)]
    assert make_plan(Job("flux", requests, model=flux, devices=["cpu"])).placer.inputs["prompt"] == requests[1].prompt
