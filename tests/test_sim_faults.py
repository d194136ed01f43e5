"""What the simulated cards do wrong or slowly on demand, and that threads can share them."""

import subprocess
import sys
import threading
import time
from types import ModuleType

import pytest
import torch

from tests.conftest import Cards

MIB = 2**20


def add_one(device: str, times: int) -> None:
    """So many kernels, one after the other."""
    x = torch.zeros(4, device=device)
    for _ in range(times):
        x += 1


def seconds(*devices: str, times: int = 20) -> float:
    """How long it takes with one thread for each device named."""
    threads = [threading.Thread(target=add_one, args=(device, times)) for device in devices]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_the_nth_next_allocation_of_a_card_fails_once(cards: Cards, sim: ModuleType, nth: int) -> None:
    first, second = cards(MIB, MIB)
    sim.fail_allocation(second, nth)
    done = []
    with pytest.raises(torch.OutOfMemoryError, match=r"of which 1\.00 MiB is free.*made to fail on demand"):
        while True:
            torch.ones(3, device=first)
            torch.ones(3, device=second)
            done.append(True)
    assert len(done) == nth - 1
    assert torch.accelerator.memory_stats(second)["num_ooms"] == 1
    assert torch.accelerator.memory_allocated(second) == 0
    assert torch.ones(3, device=second).tolist() == [1, 1, 1]


def test_results_of_kernels_and_copies_count_as_allocations(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)
    x = torch.ones(3, device=card)
    for allocate in (lambda: x + 1, lambda: torch.ones(3).to(card), lambda: x.clone(), lambda: torch.stack([x, x])):
        sim.fail_allocation(card, 1)
        with pytest.raises(torch.OutOfMemoryError, match="on demand"):
            allocate()
    sim.fail_allocation(card, 1)
    assert x.view(3, 1).t().add_(1).tolist() == [[2, 2, 2]]
    sim.reset()
    assert (x + 1).tolist() == [3, 3, 3]


@pytest.mark.parametrize("wrong", [("sim:0", 0), ("cpu", 1), ("sim", 1), ("cuda:0", 1)])
def test_a_fault_that_cannot_be_is_refused(cards: Cards, sim: ModuleType, wrong: tuple[str, int]) -> None:
    cards(MIB)
    with pytest.raises((ValueError, RuntimeError)):
        sim.fail_allocation(*wrong)


@pytest.mark.parametrize("how", ["zeros", "noise"])
@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, None), (None, 1)], ids=str)
def test_a_broken_link_corrupts_its_own_direction_in_silence(
    cards: Cards, sim: ModuleType, pair: tuple[int | None, int | None], how: str
) -> None:
    devices = [*cards(MIB, MIB), "cpu"]
    broken = tuple("cpu" if index is None else devices[index] for index in pair)
    sim.corrupt(*broken, how)
    sent = torch.full((5,), 3)
    for source in devices:
        sim.corrupt(*broken, "none")
        there = sent.to(source)
        sim.corrupt(*broken, how)
        for destination in set(devices) - {source}:
            arrived = there.to(destination)
            sim.reset()
            received = arrived.tolist()
            assert (received != sent.tolist()) == ((source, destination) == broken)
            assert received == [0] * 5 or (source, destination) != broken or how == "noise"
            sim.corrupt(*broken, how)


def test_delays_overlap_between_cards_and_add_up_on_one(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    sim.delay(per_kernel_seconds=0.01)
    assert seconds(first) >= 0.2
    together = seconds(first, first)
    assert together >= 0.4
    assert min(seconds(first, second) for _ in range(3)) < 0.75 * together


def test_copies_take_time_by_their_bytes(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    x = torch.zeros(100_000, dtype=torch.uint8, device=first)
    sim.delay(per_copied_byte_seconds=1e-6)
    start = time.perf_counter()
    x.to(second)
    assert time.perf_counter() - start >= 0.1
    sim.reset()
    start = time.perf_counter()
    x.to(second)
    assert time.perf_counter() - start < 0.1


def test_a_delayed_kernel_leaves_the_interpreter_to_others(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)
    x = torch.zeros(1, device=card)
    sim.delay(per_kernel_seconds=0.3)
    thread = threading.Thread(target=lambda: x.add_(1))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 20


def test_cards_without_bfloat16_say_so(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)
    ask = torch.get_device_module("sim").is_bf16_supported
    assert ask() and torch.bfloat16 in torch.accelerator.get_device_capability(card)["supported_dtypes"]
    sim.bfloat16(False)
    assert not ask() and torch.bfloat16 not in torch.accelerator.get_device_capability(card)["supported_dtypes"]
    sim.reset()
    assert ask()


def test_counters_are_exact_under_threads(cards: Cards, sim: ModuleType) -> None:
    devices = cards(MIB, MIB)

    def work(index: int) -> None:
        for turn in range(300):
            here, there = devices[(index + turn) % 2], devices[(index + turn + 1) % 2]
            x = torch.ones(25, device=here)
            (x + 1).to(there)
            torch.accelerator.set_device_index(here)
            assert str(torch.empty(1, device="sim").device) == here

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.accelerator.memory_allocated(device) for device in devices] == [0, 0]
    assert [torch.accelerator.memory_stats(device)["num_device_alloc"] for device in devices] == [2400, 2400]
    assert sim.copied() == {("sim:0", "sim:1"): 60_000, ("sim:1", "sim:0"): 60_000}


def test_copies_in_opposite_directions_do_not_wait_for_each_other(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    sim.delay(per_copied_byte_seconds=1e-6)

    def swap(source: str, destination: str) -> None:
        for _ in range(50):
            torch.zeros(100, dtype=torch.uint8, device=source).to(destination)

    threads = [threading.Thread(target=swap, args=pair) for pair in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert sim.copied() == {(first, second): 5000, (second, first): 5000}


def test_a_tensor_dropped_at_work_does_not_wait_for_a_thread_that_waits_for_the_card() -> None:
    """Python's lock is taken to drop it, and a thread may come to the card with that lock.

    In a process of its own, as nothing could end a deadlock in this one.
    """
    code = """
import threading, torch
from tests import sim
sim.configure([2**20])
sim.delay(per_kernel_seconds=0.0005)
kept, there = torch.ones(4), torch.ones(4, device="sim:0")
def repeat(work):
    for _ in range(50):
        work()
works = (lambda: kept.to("sim:0"), lambda: there.untyped_storage().clone())
threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
