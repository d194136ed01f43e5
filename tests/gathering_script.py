"""What test_gathering.py runs on two ranks: splits and gathers, then accelerate's pipeline parallelism."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, prepare_pippy
from torch import nn

from runner import gather, split_between_ranks
from tests.tiny import flux_transformer

PROMPTS = ("a dog", "a cat", "a chicken", "a cow", "a fox")


def splits() -> list[Any]:
    """For every count, with and without padding: what this rank got, and what was gathered of it."""
    found = []
    for count, padding in product(range(len(PROMPTS) + 1), (False, True)):
        with split_between_ranks(list(PROMPTS[:count]), apply_padding=padding) as mine:
            pictures = [f"{prompt}.png" for prompt in mine]
        found.append([count, padding, mine, gather(pictures)])
    return found


def others() -> dict[str, Any]:
    """Tuples, tensors and dicts, with padding."""
    asked = {"prompt": list(PROMPTS[:3]), "seed": torch.arange(6).reshape(3, 2)}
    with split_between_ranks(asked, apply_padding=True) as mine:
        whole = gather(mine)
    same = mine is not asked and asked["prompt"] == list(PROMPTS[:3]) and asked["seed"].shape == (3, 2)
    with split_between_ranks(PROMPTS[:3], apply_padding=True) as part:
        pair = [part, gather(part)]
    with split_between_ranks(list(PROMPTS[:2])):
        more = gather(["one"] * (1 + 2 * PartialState().process_index))
    return {"seed": mine["seed"].tolist(), "prompt": mine["prompt"], "untouched": same, "tuple": pair,
            "gathered": [whole["prompt"], whole["seed"].tolist()], "uneven": more}


class Flux(nn.Module):
    """A FLUX transformer whose inputs are tensors with a batch, which is all that the pipeline can cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = flux_transformer()
        self.register_buffer("image", torch.zeros(12, 3))
        self.register_buffer("text", torch.zeros(8, 3))

    def forward(self, latents: Any, embeds: Any, pooled: Any, time: Any, guidance: Any) -> Any:
        return self.model(hidden_states=latents, encoder_hidden_states=embeds, pooled_projections=pooled,
                          timestep=time, guidance=guidance, img_ids=self.image, txt_ids=self.text,
                          return_dict=False)[0]


def pipelined() -> dict[str, Any]:
    """What `prepare_pippy` does with FLUX, and what it keeps on each rank."""
    model = Flux()
    whole = sum(parameter.numel() for parameter in model.parameters())
    inputs = (torch.randn(2, 12, 16), torch.randn(2, 8, 32), torch.randn(2, 32), torch.rand(2), torch.full((2,), 3.5))
    prepared = prepare_pippy(model, split_points="auto", example_args=inputs, num_chunks=2, gather_output=True)
    kept = sum(parameter.numel() for parameter in prepared.parameters())
    try:
        made = prepared(*inputs)
    except RuntimeError as error:
        return {"kept": kept / whole, "failed": str(error), "because": str(error.__cause__)}
    return {"kept": kept / whole, "difference": float((made - Flux()(*inputs)).abs().max())}


if __name__ == "__main__":
    state = PartialState(cpu=True)
    told = Path(sys.argv[1]) / f"{state.process_index}.json"
    told.write_text(json.dumps({"splits": splits(), "others": others(), "pipelined": pipelined()}))
