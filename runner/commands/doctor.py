"""Is this machine able: every card tried, every pair of them, memory, disk, cache and token."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from runner.artifacts.backends import folder_of
from runner.commands.option_values import devices
from runner.commands.settings import usual_store
from runner.startup import hush
from runner.terminal import say
from runner.text import gib, table
from stages import machine
from stages.drivers import unseen_cards
from stages.errors import ModelError
from stages.machine import OTHER_TORCH, Device, Machine, computes, missing_kernels, probe
from stages.placement.transfers import corrupted_pairs
from stages.wording import counted

PACKAGES = ("diffusers", "transformers", "accelerate", "safetensors")
LEAST_DISK = 40 * 10**9


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What it is."""
    ok: bool
    """Whether it is well."""
    found: str
    """What was found."""
    advice: str = ""
    """The next step, where it is not well."""


def diagnose(*, as_json: bool, gpus: str | None) -> None:
    """Print what is well and what is not with this machine; ModelError where something is not."""
    hush()
    checks = examine(devices((), gpus))
    say(sys.stdout, [json.dumps(document(checks))] if as_json else lines(checks))
    if not healthy(checks):
        bad = [check.name for check in checks if not check.ok]
        raise ModelError(f"not well: {', '.join(bad)} -> the lines above say what to do")


def examine(names: Sequence[str] = ()) -> list[Check]:
    """Every check of this machine, on the devices that `names` selects; InvalidInput for one that is not there."""
    unseen = "" if names or torch.accelerator.is_available() else unseen_cards()
    here = probe(["cpu"] if unseen else names)
    checks = [_versions(), _host(here)]
    for card in here.cards:
        checks += [_memory(card), _architecture(card), _kernel(card), _bfloat16(card)]
    if unseen:
        found, _, advice = unseen.partition(" -> ")
        checks.append(Check("cards", False, found, advice))
    elif not here.cards:
        checks.append(Check("cards", True, "none: everything runs on the CPU in float32"))
    if len(here.cards) > 1:
        checks.append(_copies(here))
    return [*checks, *_disks(), _token()]


def healthy(checks: Sequence[Check]) -> bool:
    """Whether every check is well."""
    return all(check.ok for check in checks)


def lines(checks: Sequence[Check]) -> list[str]:
    """The checks for people, a line each, and a line with the next step under what is not well."""
    rows = []
    for check in checks:
        rows.append(("ok" if check.ok else "BAD", check.name, check.found))
        if check.advice:
            rows.append(("", "", f"-> {check.advice}"))
    return table(rows)


def document(checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as one JSON object."""
    return {"healthy": healthy(checks), "checks": [asdict(check) for check in checks]}


def _versions() -> Check:
    from importlib.metadata import version

    parts = {"python": platform.python_version()} | machine.torch_build() | {name: version(name) for name in PACKAGES}
    return Check("versions", True, ", ".join(f"{name} {text}" for name, text in parts.items()))


def _host(here: Machine) -> Check:
    low = here.host_free < here.host_total // 8
    return Check(
        "host memory", not low,
        f"{gib(here.host_free)} free of {gib(here.host_total)}, {counted(os.cpu_count() or 1, 'core')}",
        "end other programs, or give the container more memory" if low else "",
    )


def _memory(card: Device) -> Check:
    others = machine.memory_users(card.name)
    taken = card.free < card.total * 7 // 10
    found = f"{card.label}: {gib(card.free)} free of {gib(card.total)}"
    return Check(
        f"{card.name} memory", not taken, f"{found}; used by {'; '.join(others)}" if others else found,
        "end what uses it (nvidia-smi shows who), or choose other cards with --gpus" if taken else "",
    )


def _architecture(card: Device) -> Check:
    own, built = machine.architecture(card.name), machine.torch_build().get("architectures", "")
    if not own or not built:
        return Check(f"{card.name} architecture", True, "nothing to compare")
    return Check(f"{card.name} architecture", not missing_kernels(card), f"{own}; this torch is built for {built}",
                 OTHER_TORCH if missing_kernels(card) else "")


def _kernel(card: Device) -> Check:
    return _tried(f"{card.name} kernel", "a matrix product is right", lambda: computes(card.name),
                  "the matrix product is wrong")


def _bfloat16(card: Device) -> Check:
    if not card.bfloat16:
        return Check(f"{card.name} bfloat16", True, "no: FLUX's denoiser runs in float16, encoders and VAE in float32")
    numbers = torch.ones(32, 32, dtype=torch.bfloat16)
    return _tried(f"{card.name} bfloat16", "yes", lambda: torch.equal(
        (numbers.to(card.name) @ numbers.to(card.name)).cpu(), 32 * numbers), "a product in bfloat16 is wrong")


def _tried(name: str, well: str, attempt: Callable[[], bool], wrong: str) -> Check:
    try:
        right = attempt()
    except RuntimeError as error:
        # Torch's own errors of devices are all of this kind: no kernel, no memory, a card that fell off the bus.
        return Check(name, False, str(error).strip().splitlines()[0], "see the card's architecture and memory above")
    return Check(name, right, well if right else wrong, "" if right else "this card computes wrong: do not use it")


def _copies(here: Machine) -> Check:
    bad = corrupted_pairs([card.name for card in here.cards])
    if not bad:
        return Check("copies between cards", True, f"{len(here.cards) * (len(here.cards) - 1)} pairs arrive as sent")
    pairs = ", ".join(f"{source} to {target}" for source, target in bad)
    return Check("copies between cards", False, f"garbled from {pairs}",
                 "runs go through host memory by themselves, or with --no-p2p; turn the IOMMU off to mend it")


def _disks() -> Iterator[Check]:
    from huggingface_hub import constants

    from stages.models.hub import cached_ids

    models = cached_ids()
    held = f"{counted(len(models), 'model')}: {', '.join(models[:5])}" if models else "no model"
    places = [("model cache", Path(constants.HF_HUB_CACHE), f", {held}")]
    where = usual_store()
    if (store := folder_of(where)) is None:
        found = "each run has one of its own, gone with it" if where == "memory" else "a URL, which is not asked"
        yield Check("artifact store", True, f"{where}: {found}")
    else:
        places.append(("artifact store", store.absolute(), ""))
    for name, folder, more in places:
        free = shutil.disk_usage(_existing(folder)).free
        short = name == "model cache" and free < LEAST_DISK
        yield Check(name, not short, f"{folder}: {free / 1e9:.0f} GB free{more}",
                    "FLUX.1 needs 34 GB: set HF_HOME to a folder on a larger disk" if short else "")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _token() -> Check:
    from huggingface_hub import get_token

    if get_token() is not None:
        return Check("token", True, "there is one")
    return Check("token", True, "none: gated models such as FLUX.1-dev need one (hf auth login, or HF_TOKEN)")


