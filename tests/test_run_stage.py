"""A stage alone, from what the store has or from states that somebody changed."""

from pathlib import Path

import pytest
import torch

from runner import Job, Request, RunPolicy, make_plan, run_all, run_stage
from runner.artifacts import MemoryStore
from runner.planning.plan import Plan
from stages.state import State

RED, GREEN = "a red circle", "a green star"


def asked(*pictures: tuple[str, int]) -> list[Request]:
    return [Request(prompt, 64, 48, 2, 3.5, seed, 32, index) for index, (prompt, seed) in enumerate(pictures)]


@pytest.fixture(scope="module")
def kept(flux: Path) -> tuple[Plan, MemoryStore]:
    """Two prompts with two seeds, run as far as the latents."""
    store, plan = MemoryStore(), make_plan(Job("flux", asked((RED, 7), (GREEN, 8)), model=flux, devices=["cpu"]))
    run_all(plan, RunPolicy(stop_after="denoise"), store=store)
    return plan, store


def test_states_that_somebody_gives_go_through_a_stage_and_are_not_kept(kept: tuple[Plan, MemoryStore]) -> None:
    plan, store = kept
    before, latents = store.keys(), run_stage(plan, "denoise", store=store)
    moved = latents[0].values["latents"] * 0.5
    changed = [latents[0].merged(State({"latents": moved})), latents[1]]
    one, two = run_stage(plan, "decode", store=store, states=latents)
    other, same = run_stage(plan, "decode", store=store, states=changed)
    assert store.keys() == before
    assert torch.equal(two.values["pixels"], same.values["pixels"])
    assert not torch.equal(one.values["pixels"], other.values["pixels"])
    assert all(torch.equal(a.values["pixels"], b.values["pixels"])
               for a, b in zip((one, two), run_stage(plan, "decode", store=store), strict=True))


def test_swapped_embeddings_give_the_other_prompts_with_the_same_seeds(flux: Path,
                                                                       kept: tuple[Plan, MemoryStore]) -> None:
    plan, store = kept
    swapped = run_stage(plan, "encode", store=store)[::-1]
    latents = run_stage(plan, "denoise", store=store, states=swapped)
    fresh = MemoryStore()
    other = make_plan(Job("flux", asked((GREEN, 7), (RED, 8)), model=flux, devices=["cpu"]))
    run_all(other, RunPolicy(stop_after="denoise"), store=fresh)
    for ours, theirs in zip(latents, run_stage(other, "denoise", store=fresh), strict=True):
        assert torch.equal(ours.values["latents"], theirs.values["latents"])


def test_one_prompt_with_many_seeds_may_get_different_states(flux: Path, kept: tuple[Plan, MemoryStore]) -> None:
    _, store = kept
    plan = make_plan(Job("flux", asked((RED, 7), (RED, 7)), model=flux, devices=["cpu"]))
    red, = run_stage(make_plan(Job("flux", asked((RED, 7)), model=flux, devices=["cpu"])), "encode", store=store)
    none = red.merged(State({"prompt_embeds": torch.zeros_like(red.values["prompt_embeds"])}))
    first, second = run_stage(plan, "denoise", store=store, states=[red, none])
    assert not torch.equal(first.values["latents"], second.values["latents"])


def test_states_that_cannot_be_used_are_refused(kept: tuple[Plan, MemoryStore]) -> None:
    plan, store = kept
    latents = run_stage(plan, "denoise", store=store)
    with pytest.raises(ValueError, match="encode is the first stage"):
        run_stage(plan, "encode", store=store, states=latents)
    with pytest.raises(ValueError, match="1 state for 2 requests"):
        run_stage(plan, "decode", store=store, states=latents[:1])
    broken = latents[0].merged(State({"latents": torch.full_like(latents[0].values["latents"], torch.nan)}))
    with pytest.raises(ValueError, match="decode cannot work on state 0: latents holds NaN or infinity"):
        run_stage(plan, "decode", store=store, states=[broken, latents[1]])
    with pytest.raises(ValueError, match="run that stage first"):
        run_stage(plan, "decode", store=MemoryStore())
