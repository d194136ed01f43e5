"""A denoiser whose modulation is computed ahead makes the very same latents, and is smaller by what the plan says."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from runner import Plan, Request, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.plan import inputs_of
from stages.modulation import Modulation
from stages.placement import Place, Placement, Resident, Sharded
from stages.recording import conditional
from tests import tiny
from tests.test_cards import MIB, halved, over

Cards = Callable[..., list[str]]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def asked(*wanted: tuple[str, int], **more: Any) -> list[Request]:
    facts = {"steps": 3, "guidance": 3.5, "text_tokens": 32} | more
    return [Request(prompt, 64, 48, seed=seed, index=index, **facts) for index, (prompt, seed) in enumerate(wanted)]


REQUESTS = asked(("a red circle", 7), ("two small green squares", 8), ("a red circle", 9))


def plan(model: Path, dtype: torch.dtype, requests: Sequence[Request] = REQUESTS, family: str = "flux") -> Plan:
    return make_plan(family, requests, model=model, dtype={"": dtype}, devices=["cpu"])


def with_table(job: Plan, layers: frozenset[str] | None = None) -> Plan:
    """The same plan with the table."""
    (component,) = job.stages[1].components
    place = job.places[component.name]
    if layers is None:
        embeddings = run_all(job, store=(store := MemoryStore(warn=print)), stop_after="encode").keys["encode"]
        state = store.get(embeddings[0])
        assert state is not None
        layers = frozenset(conditional(job.stages[1], place.dtype, state, inputs_of(job.requests[0])).layers)
    places = {**job.places, component.name: dataclasses.replace(place, folded=layers)}
    return dataclasses.replace(job, places=places)


def latents(job: Plan) -> list[torch.Tensor]:
    store = MemoryStore(warn=print)
    keys = run_all(job, store=store, stop_after="denoise").keys["denoise"]
    return [state.tensors()["latents"] for key in keys if (state := store.get(key)) is not None]


def assert_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    assert len(some) == len(others) > 0
    assert [(a - b).abs().max().item() for a, b in zip(some, others, strict=True)] == [0.0] * len(some)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX without the guidance embedding."""
    return tiny.flux(tmp_path_factory.mktemp("schnell") / "flux", guidance=False)


@TYPES
@pytest.mark.parametrize("model", ["flux", "schnell"])
def test_several_prompts_and_seeds_come_out_the_same(
    request: pytest.FixtureRequest, model: str, dtype: torch.dtype
) -> None:
    job = plan(request.getfixturevalue(model), dtype)
    plain, replayed = latents(job), latents(with_table(job))
    assert_same(replayed, plain)
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])


def test_another_order_and_other_steps_come_out_the_same(flux: Path) -> None:
    order = [dataclasses.replace(one, index=index, steps=2 + index) for index, one in enumerate(REQUESTS[::-1])]
    job = plan(flux, torch.float32, order)
    assert_same(latents(with_table(job)), latents(job))


def test_a_table_too_large_for_its_limit_is_made_in_parts(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan(flux, torch.float32)
    expected = latents(job)
    opened: list[int] = []
    made = Modulation._written

    def counted(self: Modulation, order: Sequence[int]) -> Any:
        opened.append(len(order))
        return made(self, order)

    monkeypatch.setattr(Modulation, "_written", counted)
    monkeypatch.setattr("runner.run.Modulation", partial(Modulation, limit=1))
    assert_same(latents(with_table(job)), expected)
    # The third has the prompt of the first, whose rows are gone by then.
    assert opened == [3, 2, 1]


@TYPES
def test_a_denoiser_over_two_cards_comes_out_the_same(flux: Path, cards: Cards, dtype: torch.dtype) -> None:
    first, second = devices = cards(40 * MIB, 40 * MIB)
    places: dict[str, Placement] = {
        "text_encoder": Resident(first), "text_encoder_2": Resident(second), "transformer": halved(first, second),
        "vae": Resident(second),
    }
    job = dataclasses.replace(over(flux, devices, places), requests=tuple(REQUESTS))
    job = dataclasses.replace(job, places={n: Place(p.placement, dtype) for n, p in job.places.items()})
    assert_same(latents(with_table(job)), latents(job))


def test_blocks_that_wait_in_host_memory_come_out_the_same(flux: Path, cards: Cards) -> None:
    (card,) = devices = cards(40 * MIB)
    split_up = halved(card, card)
    hosted = Sharded(card, split_up.devices, split_up.rest, frozenset(["transformer_blocks.1"]))
    places: dict[str, Placement] = {"transformer": hosted}
    places |= {name: Resident(card) for name in ("text_encoder", "text_encoder_2", "vae")}
    job = dataclasses.replace(over(flux, devices, places), requests=tuple(REQUESTS[:2]))
    assert_same(latents(with_table(job)), latents(job))
