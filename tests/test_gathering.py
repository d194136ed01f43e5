"""Split and gather as the guides write them, and their pipeline parallelism, on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.operations import pad_input_tensors

from runner import gather, split_between_ranks
from tests.gathering_script import PROMPTS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, "-m", "tests.gathering_script", str(folder)], cwd=ROOT, capture_output=True,
                          text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_count_is_split_and_gathered_in_order(told: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(told):
        for count, padding, mine, gathered in found["splits"]:
            most, half = (count + 1) // 2, [PROMPTS[: (count + 1) // 2], PROMPTS[(count + 1) // 2 : count]][rank]
            copies = [PROMPTS[count - 1]] * (most - len(half)) if padding else []
            assert mine == [*half, *copies]
            assert gathered == [f"{prompt}.png" for prompt in PROMPTS[:count]]
    assert told[1]["splits"][7][:3] == [3, True, ["a chicken", "a chicken"]]


def test_dicts_tuples_and_tensors_are_padded_and_nothing_of_the_caller_changes(told: list[dict[str, Any]]) -> None:
    first, second = (found["others"] for found in told)
    assert (first["prompt"], first["seed"]) == (["a dog", "a cat"], [[0, 1], [2, 3]])
    assert (second["prompt"], second["seed"]) == (["a chicken"] * 2, [[4, 5], [4, 5]])
    assert first["untouched"] and second["untouched"]
    for found in (first, second):
        assert found["gathered"] == [list(PROMPTS[:3]), [[0, 1], [2, 3], [4, 5]]]
        assert found["tuple"][1] == list(PROMPTS[:3])
        assert found["uneven"] == ["one"] * 4
    assert second["tuple"][0] == ["a chicken", "a chicken"]


def test_one_process_has_all_of_it() -> None:
    with split_between_ranks({"prompt": PROMPTS, "seed": torch.arange(5)}, apply_padding=True) as mine:
        assert mine["prompt"] == PROMPTS and gather(mine["seed"]).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"equally long: \{'a': 1, 'b': 2\}"), split_between_ranks(
        {"a": [1], "b": [1, 2]}
    ):
        pass
    with pytest.raises(ValueError, match="a str cannot be split or gathered -> a list"), split_between_ranks("a dog"):
        pass


def test_accelerates_pipeline_parallelism_does_not_run_flux(told: list[dict[str, Any]]) -> None:
    """Why lanes do without it: it traces the model, and keeps all of it on every rank; FLUX fails in its first part.

    Where there are fewer inputs than chunks it adds some of zeros, which are computed.
    """
    first, second = (found["pipelined"] for found in told)
    assert first["kept"] == second["kept"] == 1.0
    assert "failed to run forward" in first["failed"] and "must match the size of tensor" in first["because"]
    assert "failed" in second
    (padded,) = pad_input_tensors((torch.randn(1, 12, 16),), 1, 2)
    assert padded.shape == (2, 12, 16) and not padded[1].any()
