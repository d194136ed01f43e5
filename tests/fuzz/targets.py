"""What is damaged: a folder that is whole, what may be changed in it, and who must then cope with it.

To add one, write a `Target` and a line in `TARGETS`: `python -m benchmarks.fuzz` and its test go through all of them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import store_targets
from tests.fuzz.mutations import change_bytes, change_document, change_safetensors


@dataclass(frozen=True)
class Target:
    """Something that reads files which anybody may have written."""

    make: Callable[[Path], object]
    """Makes the whole of it in a folder."""
    damage: Callable[[Random, Path], str]
    """Damages a copy of it, and says how."""
    use: Callable[[Path], object]
    """Reads it, in a process of its own."""
    refusals: frozenset[str]
    """The names of the errors that are an answer: every other one is a fault."""


def flux(folder: Path) -> None:
    """A tiny FLUX checkpoint, its transformer in shards."""
    from tests import tiny

    tiny.flux(folder, doubles=1, singles=2, shard="200KB")


def of_family(name: str) -> Callable[[Path], object]:
    """The maker of a tiny checkpoint of another family."""

    def make(folder: Path) -> None:
        from tests import tiny_families

        getattr(tiny_families, name)(folder)

    return make


def damage_model(random: Random, folder: Path) -> str:
    """Change a few of the files of a model: what JSON says, what headers say, or bytes."""
    return " and ".join(_damage_file(random, folder) for _ in range(random.choice((1, 1, 1, 2))))


def _damage_file(random: Random, folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Mostly the configs, where most can be said wrongly.
    configs = [path for path in files if path.suffix == ".json" and path.stat().st_size < 100_000]
    path = random.choice(configs if random.randrange(4) else files)
    data, name = path.read_bytes(), path.relative_to(folder)
    if path.suffix == ".json" and random.randrange(8):
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return f"{name}: damaged before"
        what = change_document(random, document)
        path.write_text(json.dumps(document))
    elif path.suffix == ".safetensors" and random.randrange(4):
        try:
            what, data = change_safetensors(random, data)
        except ValueError:
            return f"{name}: damaged before"
        path.write_bytes(data)
    else:
        what, data = change_bytes(random, data)
        path.write_bytes(data)
    return f"{name}: {what}"


def plan_of(family: str) -> Callable[[Path], object]:
    """Plans a run of the model in a folder."""

    def plan(folder: Path) -> None:
        import torch

        from runner import Job, make_plan
        from runner.request import requests_for
        from stages.families import FAMILIES

        requests = requests_for("a red circle", FAMILIES[family], size=(64, 64), steps=2,
                                guidance=FAMILIES[family].guidance, seed=0, text_tokens=224)
        make_plan(Job(family, list(requests), model=folder, devices=["cpu"], dtype={"": torch.float32}),
                  download=False)

    return plan


_STORE = frozenset({"StoreError", "Damaged", "BadResult"})
_REFUSALS = frozenset({"ModelError", "Incomplete", "InvalidInput", "DoesNotFit", "NotPrecomputable"})
TARGETS: Mapping[str, Target] = {
    "flux": Target(flux, damage_model, plan_of("flux"), _REFUSALS),
    "sd3": Target(of_family("sd3"), damage_model, plan_of("sd3"), _REFUSALS),
    "qwen-image": Target(of_family("qwen_image"), damage_model, plan_of("qwen-image"), _REFUSALS),
    "flux2-klein": Target(of_family("klein"), damage_model, plan_of("flux2-klein"), _REFUSALS),
    "z-image": Target(of_family("z_image"), damage_model, plan_of("z-image"), _REFUSALS),
    "lora": Target(store_targets.model_and_lora, store_targets.damage_lora, store_targets.plan_with_lora, _REFUSALS),
    "record": Target(store_targets.store, store_targets.damage_record, store_targets.use_store, _STORE),
    "store": Target(store_targets.store, store_targets.damage_store, store_targets.use_store, _STORE),
}
