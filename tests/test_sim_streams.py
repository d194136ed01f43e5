"""The simulated cards under schedules: what is ordered, when it runs, what it finds, and how long that takes."""

import threading
from types import ModuleType

import pytest
import torch

from tests.conftest import Cards

MIB = 2**20


def one(cards: Cards, sim: ModuleType, when: str | int = "late", limit: int = 100 * MIB) -> str:
    """A card that does what it is asked for under this schedule."""
    (card,) = cards(limit)
    sim.schedule(when)
    return card


def ones(card: str, count: int = 1000) -> torch.Tensor:
    tensor = torch.ones(count, device=card)
    torch.accelerator.synchronize(card)
    return tensor


def test_a_reader_that_does_not_wait_reads_what_is_not_there_yet(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    source, side, written = ones(card), torch.Stream(device=card), torch.Event(device=card)
    made = source + 1
    written.record()
    with side:
        early = made * 2
        side.wait_event(written)
        right = made * 2
        assert not (early.cpu() == 4).any() and (right.cpu() == 4).all()


def test_a_writer_that_does_not_wait_writes_over_what_is_still_read(cards: Cards, sim: ModuleType) -> None:
    found = {}
    for when in ("late", "early"):
        card = one(cards, sim, when)
        source, side = ones(card), torch.Stream(device=card)
        seen = source + 1
        with side:
            source.fill_(7)
        side.synchronize()
        found[when] = seen.cpu()[0].item()
        sim.schedule("synchronous")
    assert found["early"] == 8
    card = one(cards, sim, "early")
    source, side, read = ones(card), torch.Stream(device=card), torch.Event(device=card)
    seen = source + 1
    read.record()
    with side:
        side.wait_event(read)
        source.fill_(7)
    side.synchronize()
    assert seen.cpu()[0] == 2 and source.cpu()[0] == 7


@pytest.mark.parametrize("seed", range(8))
def test_whoever_waits_is_right_under_every_schedule(cards: Cards, sim: ModuleType, seed: int) -> None:
    first, second = cards(MIB, MIB)
    sim.schedule(seed)
    streams = [torch.Stream(device=card) for card in (first, second, first)]
    values = [torch.zeros(100, device=first)]
    before = torch.accelerator.current_stream(first).record_event()
    for number in range(6):
        stream = streams[number % 3]
        with stream:
            stream.wait_event(before)
            # Copies between cards are ordered on the stream of the source.
            torch.accelerator.current_stream(values[-1].device).wait_event(before)
            values.append(values[-1].to(stream.device, non_blocking=True) + number)
            before = stream.record_event()
    before.synchronize()
    assert values[-1].cpu().tolist() == [15.0] * 100


def test_memory_that_is_given_back_is_spoiled_in_the_order_of_its_stream(cards: Cards, sim: ModuleType) -> None:
    for recorded in (False, True):
        card = one(cards, sim)
        side, made = torch.Stream(device=card), torch.Event(device=card)
        held = torch.full((1000,), 3.0, device=card)
        made.record()
        side.wait_event(made)
        with side:
            copy = held * 2
        if recorded:
            held.record_stream(side)
        at = held.data_ptr()
        del held
        again = torch.full((1000,), 5.0, device=card)
        assert (again.data_ptr() == at) is not recorded, "the same stream has it back at once"
        torch.accelerator.current_stream(card).synchronize()
        with side:
            assert (copy.cpu() == 6).all().item() is recorded
        sim.schedule("synchronous")


def test_fresh_memory_holds_no_numbers(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    assert torch.empty(100, device=card).isnan().all()


def test_pageable_memory_is_read_at_once_and_pinned_memory_when_its_turn_comes(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    pageable, pinned = torch.ones(8), torch.ones(8, pin_memory=True)
    there = [host.to(card, non_blocking=True) for host in (pageable, pinned)]
    pageable.fill_(2)
    pinned.fill_(2)
    assert [tensor.cpu()[0].item() for tensor in there] == [1, 2]


def test_pinned_memory_that_is_dropped_while_it_is_copied_is_nobody_elses(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    pinned = torch.ones(1024, pin_memory=True)
    there = pinned.to(card, non_blocking=True)
    at = pinned.data_ptr()
    del pinned
    other = torch.zeros(1024, pin_memory=True)
    assert other.data_ptr() != at and (there.cpu() == 1).all()
    assert torch.zeros(1024, pin_memory=True).data_ptr() == at


def test_the_host_waits_where_it_does_on_cuda(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    x, pinned = ones(card), torch.empty(1000, pin_memory=True)
    calls = {
        "a kernel": (0, lambda: x + 1),
        "a number that is made on the card": (0, lambda: torch.arange(3, device=card)),
        "attention": (0, lambda: torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 10, 10, 10)] * 3)),
        "rows": (0, lambda: x[torch.zeros(3, dtype=torch.int64, device=card)]),
        "random numbers": (0, lambda: torch.rand(3, device=card)),
        "to pinned memory": (0, lambda: pinned.copy_(x, non_blocking=True)),
        "from pageable memory without waiting": (0, lambda: x.copy_(torch.zeros(1000), non_blocking=True)),
        "from pageable memory": (1, lambda: x.copy_(torch.zeros(1000))),
        "to pageable memory": (1, lambda: torch.empty(1000).copy_(x + 1, non_blocking=True)),
        "to where torch pins it": (0, lambda: (x + 1).to("cpu", non_blocking=True)),
        "a look at a number": (1, lambda: (x + 1)[0].item()),
        "a mask": (1, lambda: x[x > 0]),
        "equality": (1, lambda: torch.equal(x, x + 1)),
        "the stream": (1, lambda: (x + 1, torch.accelerator.current_stream(card).synchronize())),
        "the card": (1, lambda: (x + 1, torch.accelerator.synchronize(card))),
    }
    for name, (expected, call) in calls.items():
        torch.accelerator.synchronize(card)
        before = sim.host_waits()
        call()
        assert (name, sim.host_waits() - before) == (name, expected)
    with sim.watched_waits() as places:
        (x + 1).cpu()
    assert len(places) == 1 and places[0].split(" < ")[0].split("/")[-1].startswith("test_sim_streams.py:")


def test_an_event_that_is_asked_for_again_and_again_comes(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    made = ones(card) + 1
    event = torch.accelerator.current_stream(card).record_event()
    assert not event.query() and not torch.accelerator.current_stream(card).query()
    for _ in range(10):
        if event.query():
            break
    else:
        raise AssertionError("the card does not go on while the host asks")
    assert sim.host_waits() == 1, "asking is not waiting"
    assert made.cpu()[0] == 2


def test_the_clock_shows_what_overlaps(cards: Cards, sim: ModuleType) -> None:
    """Three blocks are copied while the one before computes: 1 + 3 x 2 seconds, or 3 + 6 one after the other."""
    for when in ("late", "early", 0, 1):
        for overlapping, expected in ((True, 7.0), (False, 9.0)):
            card = one(cards, sim, when)
            blocks = [torch.ones(1000, pin_memory=True) for _ in range(3)]
            x = ones(card)
            copies = torch.Stream(device=card) if overlapping else torch.accelerator.current_stream(card)
            sim.reset()
            sim.schedule(when)
            sim.delay(2.0, 1 / 4000)
            for block in blocks:
                with copies:
                    there = block.to(card, non_blocking=True)
                    arrived = copies.record_event()
                torch.accelerator.current_stream(card).wait_event(arrived)
                x.add_(there)
                there.record_stream(torch.accelerator.current_stream(card))
            torch.accelerator.synchronize(card)
            busy = sim.busy()
            assert sim.host_seconds() == pytest.approx(expected, abs=1e-9)
            assert busy[card, "compute"][-1][1] == pytest.approx(expected, abs=1e-9)
            length = {name: sum(end - begin for begin, end in times) for (_, name), times in busy.items()}
            assert length == {"compute": pytest.approx(6), "in": pytest.approx(3)}
            assert x.cpu()[0] == 4


def test_copies_between_cards_keep_one_engine_of_each_busy(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    sim.schedule("late")
    x, y = ones(first), ones(second)
    sim.reset()
    sim.schedule("late")
    sim.delay(0.0, 1 / 4000)
    x.to(second), y.to(first)
    torch.accelerator.synchronize(first)
    torch.accelerator.synchronize(second)
    assert set(sim.busy()) == {(first, "out"), (first, "in"), (second, "out"), (second, "in")}


def test_events_measure_the_clock(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    x = ones(card)
    sim.delay(0.25)
    start, end = (torch.Event(device=card, enable_timing=True) for _ in range(2))
    start.record()
    x + 1
    x + 2
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) == pytest.approx(500)


def test_a_kernel_that_fails_is_heard_of_when_somebody_waits_and_from_then_on(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    x = ones(card)
    sim.fail_kernel(card, 2)
    x + 1
    x + 2
    x + 3
    for wait in (lambda: torch.accelerator.synchronize(card), lambda: x.cpu(), lambda: x + 1):
        with pytest.raises(RuntimeError, match="sim error: unspecified launch failure"):
            wait()
    sim.reset()
    assert (x + 1).cpu()[0] == 2
    sim.fail_kernel(card, 1)
    with pytest.raises(RuntimeError, match="launch failure"):
        x + 1


def test_the_caching_allocator_reserves_as_that_of_cuda_does(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(64 * MIB)
    sim.caching(True, context_bytes=10 * MIB)
    reserved, allocated = torch.accelerator.memory_reserved, torch.accelerator.memory_allocated
    small = torch.empty(1, dtype=torch.uint8, device=card)
    assert (allocated(card), reserved(card)) == (1, 2 * MIB), "a small segment"
    middling = torch.empty(2 * MIB, dtype=torch.uint8, device=card)
    assert reserved(card) == 22 * MIB, "a large segment, of which there is more"
    large = torch.empty(11 * MIB, dtype=torch.uint8, device=card)
    assert reserved(card) == 22 * MIB, "which it takes"
    assert torch.accelerator.get_memory_info(card) == ((64 - 10 - 22) * MIB, 64 * MIB)
    del middling, large
    assert reserved(card) == 22 * MIB
    huge = torch.empty(33 * MIB + 1, dtype=torch.uint8, device=card)
    stats = torch.accelerator.memory_stats(card)
    assert (reserved(card), stats["num_alloc_retries"]) == (36 * MIB, 1), "what is kept goes where it is in the way"
    with pytest.raises(torch.OutOfMemoryError, match="is reserved by PyTorch but unallocated"):
        torch.empty(19 * MIB, dtype=torch.uint8, device=card)
    del huge, small
    torch.accelerator.empty_cache()
    assert reserved(card) == 0


def test_what_a_stream_keeps_is_of_no_use_to_another(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(64 * MIB)
    sim.caching(True)
    del_me = torch.empty(30 * MIB, dtype=torch.uint8, device=card)
    del del_me
    with torch.Stream(device=card):
        kept = torch.empty(30 * MIB, dtype=torch.uint8, device=card)
        assert torch.accelerator.memory_reserved(card) == 60 * MIB
        more = torch.empty(30 * MIB, dtype=torch.uint8, device=card)
    assert torch.accelerator.memory_stats(card)["num_alloc_retries"] == 1 and kept.numel() == more.numel()


def test_products_take_a_workspace_for_each_thread_and_stream_until_it_is_cleared(
    cards: Cards, sim: ModuleType
) -> None:
    (card,) = cards(MIB)
    sim.workspaces(1000)
    x = torch.ones(2, 2, device=card)

    def multiplied() -> None:
        x @ x

    def within_a_stream() -> None:
        with torch.Stream(device=card):
            x @ x

    allocated = []
    for call in (multiplied, multiplied, within_a_stream):
        call()
        allocated.append(torch.accelerator.memory_allocated(card) - x.nbytes)
    both = threading.Barrier(2)
    threads = [threading.Thread(target=lambda: (both.wait(), multiplied(), both.wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    allocated.append(torch.accelerator.memory_allocated(card) - x.nbytes)
    assert allocated == [1000, 1000, 2000, 4000]
    sim.clear_workspaces()
    assert torch.accelerator.memory_allocated(card) == x.nbytes


def test_a_process_has_contexts_on_the_cards_that_it_touched(cards: Cards, sim: ModuleType) -> None:
    sim.withdraw()
    cards(MIB, MIB, MIB)
    sim.withdraw()
    sim.configure([MIB] * 3)
    assert torch.accelerator.device_count() == 3 and torch.accelerator.is_available() and sim.contexts() == []
    torch.accelerator.get_device_capability("sim:0")
    assert sim.contexts() == []
    torch.empty(1, device="sim:1")
    torch.accelerator.get_memory_info("sim:2")
    assert sim.contexts() == ["sim:1", "sim:2"]


def test_pinned_memory_is_locked_in_powers_of_two_and_kept(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim, "synchronous")
    before = sim.pinned_bytes()
    held = torch.empty(5 * MIB, dtype=torch.uint8, pin_memory=True)
    assert sim.pinned_bytes() - before == 8 * MIB and held.is_pinned()
    del held
    assert sim.pinned_bytes() - before == 8 * MIB
    sim.limit_pinned(sim.pinned_bytes() + MIB)
    assert torch.empty(4 * MIB, dtype=torch.uint8, pin_memory=True).is_pinned(), "what is kept goes first"
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    assert card == "sim:0"


def test_only_what_draws_runs_at_once(cards: Cards, sim: ModuleType) -> None:
    card = one(cards, sim)
    sim.at_once()
    x = torch.randn(1, 4, 8, 8, device=card)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1).to(card)
    torch.nn.functional.silu(torch.nn.functional.group_norm(layer(x), 2)).mean(1).cumsum(0).sort().values.cpu()
    torch.full((3,), 2.0, device=card).expand(2, 3).contiguous().masked_fill(torch.eye(3, device=card)[:2] > 0, 0.0)
    assert {name.split("::")[1].split(".")[0] for name in sim.at_once()} <= {"normal_", "uniform_", "kaiming_uniform_"}
