"""The simulated cards as devices: memory, limits, streams, random numbers, and what is left of them afterwards."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import Cards

ROOT = Path(__file__).parents[1]


def bytes_on(device: str, count: int) -> torch.Tensor:
    """A tensor of so many bytes."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def test_each_card_has_its_own_limit_to_the_byte(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(1000, 2000)
    full = [bytes_on(first, 1000), bytes_on(second, 2000)]
    for device in (first, second):
        with pytest.raises(torch.OutOfMemoryError):
            bytes_on(device, 1)
    del full[0]
    assert bytes_on(first, 1000).numel() == 1000


def test_the_error_has_the_wording_and_figures_of_cuda(cards: Cards, sim: ModuleType) -> None:
    _, second = cards(1, 12 * 2**20)
    held = bytes_on(second, 11 * 2**20)
    with pytest.raises(torch.OutOfMemoryError) as error:
        bytes_on(second, 2 * 2**20)
    assert str(error.value).startswith(
        "sim out of memory. Tried to allocate 2.00 MiB. SIM 1 has a total capacity of 12.00 MiB of which 1.00 MiB is "
        "free. Of the allocated memory 11.00 MiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but "
        "unallocated."
    )
    assert held.numel() == 11 * 2**20


def test_more_than_the_host_has_is_still_out_of_memory(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(1000)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 1048576\.00 GiB"):
        bytes_on(card, 2**50)


def test_results_count_against_the_limit_and_temporaries_of_a_kernel_do_not(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(40_000)
    x = torch.rand(1, 1, 64, 64, device=card)
    torch.nn.functional.conv2d(x, torch.rand(1, 1, 5, 5, device=card), padding=2)
    torch.accelerator.reset_peak_memory_stats(card)
    y = x + 1
    assert torch.accelerator.memory_allocated(card) == torch.accelerator.max_memory_allocated(card) == 2 * x.nbytes
    with pytest.raises(torch.OutOfMemoryError):
        torch.cat([x, y])
    assert torch.accelerator.memory_allocated(card) == 2 * x.nbytes


@pytest.mark.parametrize("named", [str, torch.device, lambda card: int(card[-1])], ids=["name", "device", "index"])
def test_torch_accelerator_tells_bytes_however_the_card_is_named(
    cards: Cards, sim: ModuleType, named: Callable[[str], str | torch.device | int]
) -> None:
    _, second = cards(100, 2000)
    asked = named(second)
    held = bytes_on(second, 500)
    bytes_on(second, 700)
    accelerator = torch.accelerator
    assert accelerator.memory_allocated(asked) == accelerator.memory_reserved(asked) == held.nbytes
    assert accelerator.max_memory_allocated(asked) == accelerator.max_memory_reserved(asked) == 1200
    assert accelerator.get_memory_info(asked) == (1500, 2000)
    stats = accelerator.memory_stats(asked)
    assert stats["allocated_bytes.all.peak"] == 1200
    assert (stats["num_device_alloc"], stats["num_device_free"], stats["num_ooms"]) == (2, 1, 0)
    accelerator.reset_peak_memory_stats(asked)
    assert accelerator.max_memory_allocated(asked) == 500
    accelerator.empty_cache()
    accelerator.synchronize(asked)
    assert accelerator.current_stream(asked).device == torch.device("sim:1")
    assert accelerator.memory_allocated(0) == 0


def test_the_current_card_is_a_threads_own_choice(cards: Cards, sim: ModuleType) -> None:
    cards(1000, 1000)
    assert str(torch.accelerator.current_accelerator()) == "sim"
    assert torch.accelerator.device_count() == 2
    torch.accelerator.set_device_index("sim:1")
    assert str(torch.empty(1, device="sim").device) == "sim:1"
    with torch.accelerator.device_index(0):
        assert str(torch.empty(1, device="sim").device) == "sim:0"
    assert torch.accelerator.current_device_index() == 1
    for wrong in (lambda: torch.accelerator.set_device_index(2), lambda: torch.empty(1, device="sim:2"),
                  lambda: torch.accelerator.memory_allocated(2)):
        with pytest.raises(RuntimeError, match="invalid device ordinal 2, there are 2"):
            wrong()


def test_streams_and_events_can_be_used_as_with_cuda(cards: Cards, sim: ModuleType) -> None:
    _, second = cards(1000, 1000)
    x = torch.ones(3, device=second)
    stream, default = torch.Stream(device=second), torch.accelerator.current_stream(second)
    start, end = (torch.Event(device=second, enable_timing=True) for _ in range(2))
    with stream:
        assert torch.accelerator.current_stream(second) == stream != default
        start.record()
        y = x + 1
        x.record_stream(stream)
        end.record()
    default.wait_stream(stream)
    end.synchronize()
    assert torch.accelerator.current_stream(second) == default
    assert start.query() and end.query() and start.elapsed_time(end) > 0
    assert y.tolist() == [2, 2, 2]


def test_pinned_memory_says_so(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(1000)
    plain = torch.arange(4)
    pinned = plain.pin_memory()
    assert (plain.is_pinned(), pinned.is_pinned()) == (False, True)
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert pinned.to(card, non_blocking=True).tolist() == [0, 1, 2, 3]


def test_every_card_draws_its_own_random_numbers(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(1000, 1000)
    torch.manual_seed(7)
    host = torch.randn(4)
    torch.manual_seed(7)
    drawn = torch.randn(4, device=first)
    assert torch.equal(drawn.cpu(), host)
    assert torch.equal(torch.randn(4, device=second).cpu(), host)
    assert torch.equal(torch.randn(4), host)
    with torch.random.fork_rng(devices=[0]):
        torch.randn(9, device=first)
    assert not torch.equal(torch.randn(4, device=first), drawn)
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator but found 'cpu'"):
        torch.randn(4, device=first, generator=torch.Generator())


def test_a_card_with_bytes_on_it_cannot_vanish(cards: Cards, sim: ModuleType) -> None:
    _, second = cards(1000, 1000)
    held = bytes_on(second, 10)
    with pytest.raises(ValueError, match="sim:1 cannot vanish: 10 bytes"):
        sim.configure([1000])
    assert torch.accelerator.device_count() == 2
    sim.configure([500, 500, 500])
    assert torch.accelerator.get_memory_info(1) == (490, 500)
    del held
    sim.configure([1000])
    assert torch.accelerator.device_count() == 1
    with pytest.raises(ValueError, match="at most 16"):
        sim.configure([1] * 17)


def test_what_outlives_its_cards_counts_on_no_later_card(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(1000)
    left = bytes_on(card, 600)
    sim.withdraw()
    assert not torch.accelerator.is_available()
    cards(1000)
    assert torch.accelerator.get_memory_info(0) == (1000, 1000)
    del left
    assert torch.accelerator.get_memory_info(0) == (1000, 1000)


def test_moving_a_module_keeps_its_parameters_and_their_ties(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(1000)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    weight = module[0].weight
    assert module.to(card)[1].weight is weight
    assert torch.accelerator.memory_allocated(card) == weight.nbytes
    copy_skeleton = copy.deepcopy(module)
    assert copy_skeleton[0].weight is copy_skeleton[1].weight and str(copy_skeleton[0].weight.device) == card
    assert torch.accelerator.memory_allocated(card) == 2 * weight.nbytes
    module.to("cpu")
    assert torch.accelerator.memory_allocated(card) == weight.nbytes


def test_two_processes_may_build_at_once_and_a_killed_one_does_not_block(sim: ModuleType) -> None:
    """The library is there already, but the lock of a build that was killed lies beside it."""
    from tests.sim.build import alone, build

    built = Path(build())
    before = built.stat().st_mtime_ns
    with alone(built.parent):  # Another test process may be loading it.
        (built.parent / "lock").touch()
    command = [sys.executable, "-c", "from tests import sim; sim.configure([5]); print(sim.copied())"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    # Torch would wait for the lock for ever. Whether it is there afterwards says nothing: others take it, too.
    assert [process.communicate(timeout=120)[0] for process in both] == ["{}\n", "{}\n"]
    assert built.stat().st_mtime_ns == before
