"""What is damaged: a folder that is whole, what may be changed in it, and who must then cope with it.

To add one, write a `Target` and a line in `TARGETS`: `python -m benchmarks.fuzz` and its test go through all of them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

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


def make_model(folder: Path) -> None:
    """A tiny FLUX checkpoint, its transformer in shards."""
    from tests import tiny

    tiny.flux(folder, doubles=1, singles=2, shard="200KB")


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


def plan_model(folder: Path) -> None:
    """Plan a run of the model in the folder."""
    import torch

    from runner import Job, Request, make_plan

    request = Request("a red circle", 32, 32, 2, 3.5, 0, 16)
    make_plan(Job("flux", [request], model=folder, devices=["cpu"], dtype={"": torch.float32}), download=False)


TARGETS: Mapping[str, Target] = {
    "model": Target(make_model, damage_model, plan_model,
                    frozenset({"ModelError", "Incomplete", "InvalidInput", "DoesNotFit", "NotPrecomputable"})),
}
