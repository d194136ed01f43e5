"""Amounts of memory as people write them."""

import dataclasses

import pytest

from runner.placement_options import MemoryLimits, read_bytes
from runner.planning.memory_limits import limited, read_machine
from stages.errors import DoesNotFit, Fix
from stages.machine import Device, Machine, probe

GIB = 2**30
TWO = Machine(
    (Device("cuda:0", 16 * GIB, 15 * GIB, True), Device("cuda:1", 8 * GIB, 8 * GIB, True)), 64 * GIB, 60 * GIB
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("14GiB", 14 * GIB), ("14 GiB", 14 * GIB), ("14", 14 * GIB), ("0.5", GIB // 2), ("16gb", 16 * 10**9),
        ("16GB", 16 * 10**9), ("1.5TB", 15 * 10**11), ("512MiB", 512 * 2**20), ("512mb", 512 * 10**6), ("100B", 100),
    ],
)
def test_units_are_never_misread(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "16G", "16g", "nanGB", "infGiB", "-1GB", "1e3GB", "GiB", "16 GB GB", "0"])
def test_what_is_no_amount_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="write "):
        read_bytes(text)


def test_a_unit_that_may_mean_two_things_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match="write 16GiB or, for powers of ten, 16GB"):
        read_bytes("16G")


def test_one_value_is_for_every_card_and_not_for_the_host() -> None:
    machine = limited(TWO, MemoryLimits.read("7GiB"))
    assert machine.limits == {"cuda:0": 7 * GIB, "cuda:1": 7 * GIB}
    assert machine.host_limit is None and machine.host_room == 60 * GIB - 256 * 2**20


def test_values_by_device() -> None:
    machine = limited(TWO, MemoryLimits.read("0=14GiB, cuda:1=4GB ,cpu=24GiB"))
    assert machine.limits == {"cuda:0": 14 * GIB, "cuda:1": 4 * 10**9, "cpu": 24 * GIB}
    assert machine.host_room == 24 * GIB and machine.unlimited == TWO
    assert limited(TWO, MemoryLimits.read("1=2GiB")).limits == {"cuda:1": 2 * GIB}


def test_percent_are_of_the_whole_card_and_a_negative_value_stays_free() -> None:
    assert limited(TWO, MemoryLimits.read("50%")).limits == {"cuda:0": 8 * GIB, "cuda:1": 4 * GIB}
    assert limited(TWO, MemoryLimits.read("-2GiB")).limits == {"cuda:0": 13 * GIB, "cuda:1": 6 * GIB}


def test_a_limit_that_cannot_be_is_left_out_of_the_next_command() -> None:
    for text, left in (("0=20GiB,1=4GiB,cpu=8GiB", "1=4GiB,cpu=8GiB"), ("20GiB", ""), ("-20GiB", "")):
        with pytest.raises(DoesNotFit) as refused:
            limited(TWO, MemoryLimits.read(text))
        assert refused.value.fixes == (Fix("max_memory", left or None),)


def test_where_there_are_no_cards_the_host_is_named_once() -> None:
    host = Machine((Device("cpu", 16 * GIB, 15 * GIB, bfloat16=False),), 16 * GIB, 15 * GIB)
    with pytest.raises(ValueError, match=r"'0', which is not used here: choose from cpu$"):
        limited(host, MemoryLimits.read("0=1GB"))


def test_a_limit_is_no_promise_that_the_memory_is_free() -> None:
    room = limited(TWO, MemoryLimits.read("100%")).devices[0].room
    assert room == TWO.devices[0].room == 15 * GIB - 512 * 2**20
    assert limited(TWO, MemoryLimits.read("0=14GiB")).devices[0].room == 14 * GIB


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("7=1GB", "'7', which is not used here: choose from cuda:0, cuda:1, cpu"),
        ("0=-1GB", "leave memory free on every card write max_memory"),
        ("0=1GB,0=2GB", "twice"), ("0=1GB,cuda:0=2GB", "twice"),
        ("0=1GB,", "no device=amount"), ("=1GB", "no device=amount"), ("0=", "no device"),
        ("0%", "more than 0%"), ("101%", "no more than 100%"), ("nonsense", "no amount"),
    ],
)
def test_nonsense_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        limited(TWO, MemoryLimits.read(text))


@pytest.mark.parametrize(("text", "why"), [
    ("17GiB", "18253611008 bytes .*more than the 17179869184 bytes .16.0 GiB. of cuda:0"),
    ("1=9GiB", "of cuda:1"), ("-15GiB", "leaves nothing of cuda:0"), ("cpu=65GiB", "of cpu"),
])
def test_a_limit_above_the_card_does_not_fit(text: str, why: str) -> None:
    with pytest.raises(DoesNotFit, match=why):
        limited(TWO, MemoryLimits.read(text))


def test_machines_that_are_not_here() -> None:
    def sizes(text: str) -> list[int]:
        return [device.total for device in read_machine(text).devices]

    assert sizes("2x16GB") == [16 * 10**9] * 2
    assert sizes("16GB+8GiB") == [16 * 10**9, 8 * GIB]
    assert sizes("1x24GiB+2x8") == [24 * GIB, 8 * GIB, 8 * GIB]
    machine = read_machine("4x12GB")
    assert [device.name for device in machine.devices] == [f"cuda:{index}" for index in range(4)]
    assert not machine.here and not machine.counts_host and machine.disk_free is None
    assert machine.devices[0].room == 12 * 10**9 - GIB


@pytest.mark.parametrize("text", ["", "2x", "x16GB", "0x16GB", "2/16GB", "16GB+", "a101", "65x1GB", "2x16GB,8GB"])
def test_what_is_no_machine_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write|limit|joined by"):
        read_machine(text)


def test_limits_hold_on_a_machine_that_has_only_a_host() -> None:
    host = probe(["cpu"])
    assert limited(host, MemoryLimits.read("50%")).devices[0].room <= host.host_total // 2
    assert dataclasses.replace(limited(host, MemoryLimits.read("cpu=1GiB")), devices=()).host_room == GIB
