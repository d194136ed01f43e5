"""Cards by name, and the machines that a text spells with them."""

import pytest

from runner.machine_option import MachineOption, means_machine
from runner.placement_options import MemoryLimits
from runner.planning.memory_limits import limited, read_machine
from stages.cards import CARDS, GIB, MIB, Card, find_card, near_names, variants
from stages.errors import InvalidInput


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.full_name)
def test_a_card_is_found_by_its_own_name_and_its_numbers_are_sane(card: Card) -> None:
    assert find_card(card.full_name) is find_card(f"NVIDIA GeForce RTX {card.name} {card.gigabytes} GB") is card
    assert find_card(card.name.upper()) is variants(card.name)[0]
    assert 0.9 * card.gigabytes * GIB < card.memory < card.gigabytes * GIB
    assert 1e12 < card.single <= card.half < 3e15 and 1e9 < card.link < 64e9
    assert card.rate("bfloat16") == (card.half if card.bfloat16 else None) and card.rate("float8") is None


def test_no_two_cards_have_one_name() -> None:
    names = [card.full_name for card in CARDS]
    assert len(names) == len({*names})


@pytest.mark.parametrize(("text", "name"), [
    ("t4", "T4-16GB"), ("Tesla T4", "T4-16GB"), ("T4-16GB", "T4-16GB"), ("rtx 4060 ti", "4060Ti-16GB"),
    ("4060Ti-8GB", "4060Ti-8GB"), ("4060ti16gb", "4060Ti-16GB"), ("RTX4090", "4090-24GB"), ("A100", "A100-40GB"),
    ("a100 80 gb", "A100-80GB"), ("A100-80G", "A100-80GB"), ("RTX A6000", "A6000-48GB"), ("a10g", "A10G-24GB"),
    # As drivers write them.
    ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
    ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("NVIDIA H100 PCIe", "H100PCIe-80GB"), ("NVIDIA H100 NVL", "H100NVL-94GB"),
    ("NVIDIA H200", "H200-141GB"), ("Tesla V100-SXM2-32GB", "V100-32GB"), ("Tesla P100-PCIE-16GB", "P100-16GB"),
    ("NVIDIA RTX 6000 Ada Generation", "6000Ada-48GB"), ("NVIDIA TITAN RTX", "TitanRTX-24GB"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "PRO6000-96GB"), ("Quadro RTX 8000", "8000-48GB"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070TiSuper-16GB"), ("NVIDIA GeForce GTX 1080 Ti", "1080Ti-11GB"),
])
def test_names_as_people_and_drivers_write_them(text: str, name: str) -> None:
    found = find_card(text)
    assert found is not None and found.full_name == name


@pytest.mark.parametrize("text", ["", "hypothetical", "CPU", "GeForce RTX 3080 Laptop GPU", "A100-20GB", "sim:0"])
def test_what_is_not_in_the_table_is_no_card(text: str) -> None:
    assert find_card(text) is None


def test_typos_are_near_a_name() -> None:
    assert near_names("4061ti")[0] == "4060Ti" and "T4" in near_names("t5") and near_names("voodoo") == ()


def cards(text: str) -> list[tuple[str, bool]]:
    return [(device.label, device.bfloat16) for device in read_machine(text).devices]


def test_machines_by_the_names_of_their_cards() -> None:
    assert cards("2xT4") == cards("T4x2") == cards("2 x tesla t4") == [("T4-16GB", False)] * 2
    assert cards("1x3090+1x4060") == cards("3090 + RTX 4060") == [("3090-24GB", True), ("4060-8GB", True)]
    assert cards("8xH100") == [("H100-80GB", True)] * 8
    assert cards("T4+16GB") == [("T4-16GB", False), ("hypothetical", True)]
    assert cards("2x16GB,no-bf16") == [("hypothetical", False)] * 2
    assert cards("2xT4,bf16") == [("T4-16GB", True)] * 2
    card = read_machine("2xT4").devices[1]
    assert (card.name, card.total, card.room) == ("cuda:1", 15095 * MIB, 15095 * MIB - GIB)


@pytest.mark.parametrize(("text", "usual"), [
    ("2*T4", "2xT4"), ("2 T4", "2xT4"), ("2T4", "2xT4"), ("2\u00d7t4", "2xT4"), ("T4*2", "2xT4"), ("H100:8", "8xH100"),
    ("2x16G", "2x16GB"), ("16g", "16GB"), ("16Gi", "16GiB"), ("2 24 GB", "2x24GB"), ("3090,4060", "3090+4060"),
    ("3090 and RTX 4060", "3090+4060"), ("3090x2", "2x3090"), ("2 3090", "2x3090"), ("rtx3090", "3090"),
    ("RTX 4090", "4090"), ("a100", "A100"), ("A100 (80GB)", "A100-80GB"), ("2xa100-80", "2xA100-80GB"),
    ("4060 Ti 8", "4060Ti-8GB"), ("2x16GB+ram=30GB", "2x16GB,ram=30GB"), ("2xT4; RAM=30G", "2xT4,ram=30GB"),
    ("24GB+no-bf16", "24GB,no-bf16"), ("cpu+ram=32GB", "cpu,ram=32GB"),
])
def test_a_machine_may_be_written_otherwise(text: str, usual: str) -> None:
    assert MachineOption.read(text) == MachineOption.read(usual) and means_machine(text)


@pytest.mark.parametrize("text", ["a fox", "16", "64x64", "512x512", "two", "2 foxes", "cpu", "1000xT4", ""])
def test_what_is_no_machine_is_not_taken_for_one(text: str) -> None:
    assert not means_machine(text)


def test_memory_and_disk_are_those_that_are_said() -> None:
    machine = read_machine("1x24GB, RAM = 16GB, disk=100GB")
    assert machine.host_total == 16 * 10**9 and machine.disk_free == 100 * 10**9 and machine.counts_host
    assert machine.host_free == 16 * 10**9 - GIB and machine.limits == {}
    unsaid = read_machine("1x24GB")
    assert not unsaid.counts_host and unsaid.disk_free is None and unsaid.host_room > 2**50
    assert limited(unsaid, MemoryLimits.read("cpu=4GiB")).host_room == 4 * GIB
    with pytest.raises(InvalidInput, match="ram=32GB"):
        limited(unsaid, MemoryLimits.read("cpu=50%"))
    host = read_machine("cpu,ram=16GB")
    assert not host.cards and host.devices[0].room == 16 * 10**9 - GIB - 256 * MIB
    assert type(host).from_json(host.to_json()) == host


def test_what_is_assumed_is_said() -> None:
    t4, *rest = MachineOption.read("2xT4").assumed
    assert t4.startswith("T4-16GB: 14.7 GiB as torch sees it, no bfloat16") and "13 GB/s" in t4
    assert [text.partition(":")[0] for text in rest] == ["host memory", "disk"]
    assert "bfloat16 (no-bf16 says" in MachineOption.read("16GB").assumed[0]
    assert MachineOption.read("16GB,ram=8GB,disk=9GB,bf16").assumed == ()
    assert "A100-80GB would be another" in MachineOption.read("A100").assumed[0]
    assert "taken with bfloat16" in MachineOption.read("T4,bf16").assumed[0]
    assert "450 GB/s over NVLink" in MachineOption.read("8xH100").assumed[0]


@pytest.mark.parametrize(("text", "why"), [
    ("2x4061", "did you mean 4060"), ("2xT5", "did you mean T4"), ("3090-16GB", "3090-24GB"),
    ("A100-20GB", "A100-40GB or"),
    ("2xT4,8GB", "joined by [+]"), ("2xT4,ram", "ram=30GB"), ("2xT4,ram=much", "no amount of memory"),
    ("2xT4,ram=8GB,ram=9GB", "ram twice"), ("2xT4,bf16,no-bf16", "bf16 twice"), ("cpu", "cpu,ram=32GB"),
    ("16GB,8GB", "2xT4[+]8GB; ram=8GB is"), ("ram=30GB", "names no card.*cpu,ram=32GB"),
    ("T4 T4", "1x3090[+]1x4060"), ("65xT4", "the limit is 64"), ("1000xT4", "has 1,000 cards; the limit is 64"),
    ("512x512", "2x16GB"), ("0xT4", "no machine"), ("T4+", "no machine"), ("2x4000", "A4000"), ("x", "2xT4"),
])
def test_what_cannot_be_is_refused_with_what_can(text: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        MachineOption.read(text)
