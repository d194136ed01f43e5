"""What crosses between cards: each thing once a step, by the shortest way, and nothing else."""

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from runner import Job, Plan, Request, RunPolicy, make_plan, run_all, run_stage
from runner.artifacts import MemoryStore
from stages.errors import DoesNotFit
from stages.estimate.dry_run import dry_run
from stages.machine import MIB
from stages.placement.placement import Place, verified
from stages.placement.sharded import Sharded
from stages.placement.streaming import Streamed
from stages.placement.transfers import Crossing, corrupted_pairs, direct, via_host
from stages.state import State

Cards = Callable[..., list[str]]
WIDTH, HEAD, IMAGE, TEXT, FLOAT = 32, 16, (64 // 16) * (48 // 16), 32, 4


def sharded(flux: Path, devices: list[str], runs: str, steps: int) -> Plan:
    request = Request("a red circle", 64, 48, steps, 3.5, 7, TEXT)
    return make_plan(Job("flux", [request], model=flux, devices=devices, dtype={"": torch.float32},
                         place=["encode=0", f"denoise={runs}", "decode=0"], modulation_table=False))


def crossed(flux: Path, devices: list[str], sim: ModuleType, runs: str, steps: int) -> dict[tuple[str, str], int]:
    """Bytes copied between cards by a denoise."""
    job, store = sharded(flux, devices, runs, steps), MemoryStore(warn=print)
    run_stage(job, "encode", store=store)
    sim.reset_copied()
    run_stage(job, "denoise", store=store)
    return {pair: count for pair, count in sim.copied().items() if "cpu" not in pair}


@pytest.mark.parametrize(
    ("runs", "ways"),
    [("0:2,1:2,0:2", ["01", "10"]), ("0:3,1:3", ["01", "10"]), ("0:2,1:1,2:2,0:1", ["01", "12", "20"]),
     ("0:2,1:2,2:2", ["01", "12", "20"])],
)
def test_bytes_per_step_are_the_least(flux: Path, cards: Cards, sim: ModuleType, runs: str, ways: list[str]) -> None:
    """Both streams over every border; to each other card once the conditioning vector and two rotary tables.

    After the last block only the image is of use, so only it comes home where that block is elsewhere.
    """
    devices = cards(40 * MIB, 40 * MIB, 40 * MIB)
    fewer, more = (crossed(flux, devices, sim, runs, steps) for steps in (2, 5))
    streams = (IMAGE + TEXT) * WIDTH * FLOAT
    constants = (WIDTH + 2 * (IMAGE + TEXT) * HEAD) * FLOAT
    step = {pair: (more[pair] - fewer[pair]) / 3 for pair in more}
    assert {f"{source[-1]}{target[-1]}" for source, target in step} >= set(ways)
    home = streams if runs.rpartition(",")[2].startswith("0") else IMAGE * WIDTH * FLOAT
    assert sum(step.values()) == (len(ways) - 1) * (streams + constants) + home
    assert sum(count for (_, target), count in step.items() if target == "sim:0") == home


def test_a_copy_lives_as_long_as_its_source_and_follows_its_changes(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    model = nn.Sequential(nn.Identity(), nn.Identity())
    Crossing(model, {"0": second, "1": second}, first)
    source = torch.ones(1000, device=first)
    sim.reset_copied()
    seen = model[0](source)
    assert torch.equal(seen.cpu(), source.cpu()) and seen.device == torch.device(second)
    assert model[1](source) is seen and sim.copied()[first, second] == 4000
    source.mul_(2)
    assert model[0](source).cpu().tolist() == [2.0] * 1000 and sim.copied()[first, second] == 8000
    del seen, source
    gc.collect()
    assert torch.accelerator.memory_allocated(second) == 0


def test_of_what_a_model_gives_no_copy_stays(cards: Cards, sim: ModuleType) -> None:
    """Hidden states of a text encoder live on while the next encoder runs."""
    first, second = cards(MIB, MIB)

    class Encoder(nn.Sequential):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            hidden = self[0](x) + 1
            return [hidden, self[1](hidden)]

    model = Encoder(nn.Identity(), nn.Identity())
    Crossing(model, {"": first, "0": first, "1": second}, first)
    hidden, last = model(torch.ones(1000, device=first))
    assert hidden.cpu().tolist() == last.cpu().tolist() == [2.0] * 1000
    assert hidden.device == last.device == torch.device(first)
    gc.collect()
    assert torch.accelerator.memory_allocated(second) == 0


def test_cards_that_garble_copies_are_gone_around(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    sim.corrupt(first, second, "zeros")
    source = torch.arange(1000.0, device=first)
    assert not torch.equal(direct(source, second).cpu(), source.cpu())
    assert torch.equal(via_host(source, second).cpu(), source.cpu())
    assert via_host(source, first) is source


def test_garbled_copies_are_found_and_gone_around(flux: Path, cards: Cards, sim: ModuleType) -> None:
    first, second = devices = cards(40 * MIB, 40 * MIB)
    assert corrupted_pairs(devices) == []
    job, store = sharded(flux, devices, "0:2,1:2,0:2", 2), MemoryStore(warn=print)
    (expected,) = (picture.pixels for picture in run_all(job, store=store).pictures)
    told: list[str] = []

    def emit(kind: str, data: Any) -> None:
        told.append(data["text"])

    places = job.places_of("denoise")
    assert verified(places, emit) is places and told == []
    for how in ("zeros", "noise"):
        sim.corrupt(first, second, how)
        assert corrupted_pairs(devices) == [(first, second)]
        around = job.moved("denoise", verified(places, emit))
        assert "copies from sim:0 to sim:1 arrive garbled" in told[-1]
        made = run_all(around, RunPolicy(from_stage="denoise"), store=store).pictures[0].pixels
        assert (made == expected).all()


@pytest.mark.parametrize("table", [False, True], ids=["whole", "table"])
def test_without_peer_copies_cards_send_each_other_nothing(
    flux: Path, cards: Cards, sim: ModuleType, table: bool
) -> None:
    devices = cards(40 * MIB, 40 * MIB)
    request = Request("a red circle", 64, 48, 2, 3.5, 7, TEXT)
    job = make_plan(Job("flux", [request], model=flux, devices=devices,
                        place=["encode.text_encoder=1", "denoise=0:3,1:3"], dtype={"": torch.float32},
                        peer_copies=False, modulation_table=table))
    sim.reset_copied()
    run_all(job)
    assert all("cpu" in pair for pair in sim.copied())


def test_the_modulation_table_is_right_where_copies_are_garbled(flux: Path, cards: Cards, sim: ModuleType) -> None:
    """Its layers compute where their weights would be, so what they read crosses, too."""
    first, second = devices = cards(40 * MIB, 40 * MIB)
    request = Request("a red circle", 64, 48, 2, 3.5, 7, TEXT)
    job = make_plan(Job("flux", [request], model=flux, devices=devices, place=["denoise=0:3,1:3"],
                        dtype={"": torch.float32}))
    assert job.places["denoise", "transformer"].precomputed
    expected = run_all(job).pictures[0].pixels
    sim.corrupt(first, second, "noise")
    sim.corrupt(second, first, "zeros")
    assert (run_all(job).pictures[0].pixels == expected).all()


def test_sharded_encoders_equal_whole_ones(flux: Path, cards: Cards, sim: ModuleType) -> None:
    """CLIP's and T5's position biases are made in the first block and used in all."""
    devices = cards(40 * MIB, 40 * MIB)
    whole, store = sharded(flux, devices, "0:6", 1), MemoryStore(warn=print)
    (expected,) = run_stage(whole, "encode", store=store)
    request = whole.requests[0]
    split = make_plan(Job("flux", [request], model=flux, devices=devices, dtype={"": torch.float32},
                          place=["encode.text_encoder=0:1,1:1,0:1", "encode.text_encoder_2=1:1,0:1"]))
    (state,) = run_stage(split, "encode", store=MemoryStore(warn=print))
    assert all(torch.equal(tensor, state.tensors()[name]) for name, tensor in expected.tensors().items())


def test_nothing_of_a_streamed_block_stays_on_the_card(flux: Path, cards: Cards, sim: ModuleType) -> None:
    devices = cards(40 * MIB)
    whole, store = sharded(flux, devices, "0:6", 2), MemoryStore(warn=print)
    (expected,) = (picture.pixels for picture in run_all(whole, store=store).pictures)
    placement = whole.places["denoise", "transformer"].placement
    assert isinstance(placement, Sharded)
    streamed = Streamed(placement.device, placement.devices, placement.rest, cpu_blocks=frozenset(placement.devices))
    job = whole.moved("denoise", {"transformer": Place(streamed, torch.float32)})
    report = run_all(job, RunPolicy(from_stage="denoise"), store=store)
    assert (report.pictures[0].pixels == expected).all()
    rest = sum(job.weights["denoise", "transformer"].rest.values())
    block = max(job.weights["denoise", "transformer"].blocks.values())
    assert report.stages[1].peak[devices[0]] < rest + block + whole.needs["denoise"][devices[0]].activations + 1
    assert report.stages[1].flushed.left == 0


def test_a_rehearsal_finds_out_where_tensors_of_two_cards_would_meet(flux: Path) -> None:
    """A placement that leaves a block's own parts on another card fails before anything is loaded."""
    job = make_plan(Job("flux", [Request("a red circle", 64, 48, 1, 3.5, 7, TEXT)], model=flux, devices=["cpu"],
                        modulation_table=False))
    encode, denoise = job.stages[:2]
    weights = {name: weight for (_, name), weight in job.weights.items()}
    asked = {"prompt": "a", "max_sequence_length": TEXT}
    state = dry_run(encode, job.places_of("encode"), weights, State(), asked, {}).state
    devices = dict.fromkeys(job.weights["denoise", "transformer"].blocks, "cuda:0")
    torn = Sharded("cuda:0", {**devices, "transformer_blocks.0.ff": "cuda:1"})
    inputs = {"width": 64, "height": 48, "num_inference_steps": 1, "seed": 1}
    with pytest.raises(DoesNotFit, match="would meet tensors of cuda:0 and cuda:1"):
        dry_run(denoise, {"transformer": Place(torn, torch.float32)}, weights, state, inputs, {})
