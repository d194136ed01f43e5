"""What `doctor` finds, on simulated cards that are well and that are not."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from runner import Job, Request, make_plan
from runner.commands.doctor import Check, document, examine, healthy, lines
from stages import machine
from stages.machine import MIB, check_cards, covers, probe

Cards = Callable[..., list[str]]


def named(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_two_cards_that_are_well(cards: Cards, sim: ModuleType) -> None:
    devices = cards(40 * MIB, 20 * MIB)
    found = named(examine())
    assert "40.0 MiB free of 40.0 MiB" in found[f"{devices[0]} memory"].found
    assert found[f"{devices[1]} kernel"] == Check(f"{devices[1]} kernel", True, "a matrix product is right")
    assert found["copies between cards"].found == "2 pairs arrive as sent"
    assert all(found[f"{device} {what}"].ok for device in devices for what in ("memory", "kernel", "bfloat16"))
    assert torch.accelerator.memory_allocated(devices[0]) == 0


def test_a_garbled_copy_is_found(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(40 * MIB, 20 * MIB)
    sim.corrupt(second, first, "noise")
    checks = examine()
    bad = named(checks)["copies between cards"]
    assert not bad.ok and bad.found == "garbled from sim:1 to sim:0" and "--no-p2p" in bad.advice
    assert not healthy(checks) and not document(checks)["healthy"]


def test_a_card_that_others_fill_or_that_fails_is_found(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(40 * MIB, 40 * MIB)
    held = torch.empty(30 * MIB, dtype=torch.uint8, device=first)
    sim.fail_allocation(second, 1)
    found = named(examine())
    assert not found[f"{first} memory"].ok and "10.0 MiB free of 40.0 MiB" in found[f"{first} memory"].found
    assert found[f"{second} memory"].ok and not found[f"{second} kernel"].ok
    assert "out of memory" in found[f"{second} kernel"].found
    del held


def test_cards_without_bfloat16_are_told_what_runs_instead(cards: Cards, sim: ModuleType) -> None:
    (device,) = cards(40 * MIB)
    sim.bfloat16(False)
    try:
        check = named(examine())[f"{device} bfloat16"]
    finally:
        sim.bfloat16(True)
    assert check.ok and check.found == "no: FLUX's denoiser runs in float16, encoders and VAE in float32"


def test_devices_are_selected(cards: Cards, sim: ModuleType) -> None:
    cards(40 * MIB, 40 * MIB)
    found = named(examine(["1"]))
    assert "sim:1 kernel" in found and "sim:0 kernel" not in found and "copies between cards" not in found
    with pytest.raises(ValueError, match="no device"):
        examine(["7"])


def test_a_machine_without_cards_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(examine(["cpu"]))
    assert found["cards"].found.startswith("none: everything runs on the CPU")
    assert f"torch {torch.__version__}" in found["versions"].found and "diffusers 0.42" in found["versions"].found


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SENTINEL")
    checks = examine(["cpu"])
    assert named(checks)["token"].found == "there is one"
    assert "SENTINEL" not in json.dumps(document(checks)) + "".join(lines(checks))


def test_a_short_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("runner.commands.doctor.LEAST_DISK", 2**80)
    bad = named(examine(["cpu"]))["model cache"]
    assert not bad.ok and "HF_HOME" in bad.advice
    assert any(line.startswith("BAD  model cache") for line in lines([bad])) and "->" in lines([bad])[1]


@pytest.mark.parametrize(("where", "says"), [
    ("kept/stages", "kept/stages: "), ("s3://bucket/stages", "s3://bucket/stages: a URL, which is not asked"),
    ("memory", "memory: each run has one of its own"),
])
def test_the_store_is_that_of_the_settings(
    where: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAGERUN_ARTIFACTS", where)
    found = named(examine(["cpu"]))["artifact store"]
    assert found.ok and says in found.found and found.found.startswith(("/", where)) and "GB free" * (
        where == "kept/stages") in found.found


def test_a_card_that_cannot_compute_is_refused_before_anything_is_planned(
    cards: Cards, monkeypatch: pytest.MonkeyPatch, sim: ModuleType
) -> None:
    first, second = cards(40 * MIB, 40 * MIB)
    sim.fail_allocation(second, 1)
    assert check_cards(probe()).devices == probe().devices, "a full card is not a broken one"
    requests = [Request("a red circle", 64, 64, steps=1, guidance=None, seed=1, text_tokens=20)]
    sim.corrupt(second, "cpu", "noise")
    with pytest.raises(ValueError, match=r"sim:1 .* gets a matrix product wrong -> .* \(devices='0'\)"):
        make_plan(Job("demo", requests))
    assert check_cards(probe([first])).cards[0].name == first
    monkeypatch.setattr(machine, "architecture", lambda name: "sm_60")
    monkeypatch.setattr(machine, "torch_build", lambda: {"architectures": "sm_75 sm_80"})
    with pytest.raises(ValueError, match=r"is sm_60, .* built for sm_75 sm_80 -> .*CUDA 12.6.* \(devices='1'\)"):
        make_plan(Job("demo", requests))
    assert not named(examine())[f"{first} architecture"].ok


@pytest.mark.parametrize(
    ("built", "card", "fits"),
    [
        (["sm_75", "sm_80", "sm_86", "sm_90"], "sm_60", False), (["sm_50", "sm_60"], "sm_61", True),
        (["sm_80"], "sm_86", True), (["sm_86"], "sm_80", False), (["sm_90", "compute_90"], "sm_120", True),
        (["sm_80"], "sm_90", False), (["sm_90a"], "sm_90", True), (["sm_100", "sm_120"], "sm_120", True),
    ],
)
def test_which_builds_have_kernels_for_which_cards(built: list[str], card: str, fits: bool) -> None:
    assert covers(built, card) == fits
