"""The recipes of CONTRIBUTING, followed: a family and a placement that the project does not have, from end to end."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from PIL import Image
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from runner import Job, Request, make_plan, run_all
from runner.commands.cli import answer
from runner.planning.ladder import LADDER, PlacementProblem, Placements, Rooms
from stages.families import FAMILIES, Family
from stages.machine import Machine
from stages.models.weights import Weights
from stages.placement.placement import Fetch, Placement, from_host
from stages.placement.transfers import Crossing, Transfer
from tests import tiny
from tests.staging import run_whole
from tests.tiny_families import WIDTH, qwen_tokenizer

ROOT = Path(__file__).parent.parent
KINDS = {"Resident", "Sharded", "Streamed", "TensorParallel"}
Cards = Callable[..., list[str]]

# "Add a family": a line in FAMILIES, and a tiny checkpoint of its classes.

TOY = Family("toy", "krea/Krea-2-Raw", "Krea2Pipeline", 2, 4.5, 64, (64, 48), negative=True)


def toy_checkpoint(folder: Path) -> Path:
    """A Krea 2 checkpoint, whose text encoder has as many layers as the pipeline reads."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 36,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
              "deepstack_visual_indexes": [0]}
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4,
            latents_std=[2.0] * 4,
        ).eval(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel(
            in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=WIDTH, timestep_embed_dim=16, text_hidden_dim=WIDTH, num_text_layers=12,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=WIDTH,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        ).eval(),
    ).save_pretrained(folder)
    return folder


def test_a_family_is_a_line_and_makes_the_picture_of_its_unsplit_pipeline(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    model = toy_checkpoint(tmp_path / "toy")
    expected, _ = run_whole(model, {
        "prompt": "a red circle", "width": 64, "height": 48, "num_inference_steps": 2, "guidance_scale": 4.5,
        "seed": 7, "max_sequence_length": 64, "negative_prompt": "two squares",
    })
    request = Request("a red circle", 64, 48, 2, 4.5, 7, 64, negative_prompt="two squares")
    made = run_all(make_plan(Job("toy", [request], model=model, dtype="float32", devices="cpu")))
    assert torch.equal(torch.from_numpy(made.pictures[0].pixels), expected)
    # Dealt over two cards, from the command line.
    first, second = cards(40_000_000, 40_000_000)
    out = tmp_path / "out.png"
    assert answer(["batch", "toy", "--model", str(model), "--prompt", "a red circle", "--negative-prompt",
                   "two squares", "--seed", "7", "--dtype", "float32", "--place", "denoise=sharded", "--out", str(out),
                   "--device", first, "--device", second, "--artifacts", "memory", "-q"]) == 0
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), expected.numpy())


# "Add a placement": a class that says where a component is, and a strategy of the ladder that chooses it.


@dataclass(frozen=True, repr=False)
class Alternating(Placement):
    """Every second block on the second card, so that a pass crosses between them all the time."""

    cards: tuple[str, str]
    """The two cards; what is in no block is on the first."""
    blocks: tuple[str, ...]
    """The blocks, by module name in execution order."""

    def __str__(self) -> str:
        return f"alternating over {', '.join(self.cards)}"

    @property
    def entry(self) -> str:
        return self.cards[0]

    @property
    def compute_devices(self) -> dict[str, str]:
        return {"": self.cards[0]} | {name: self.cards[at % 2] for at, name in enumerate(self.blocks)}

    def share(self, weights: Weights) -> dict[str, int]:
        found = Counter({self.cards[0]: sum(weights.rest.values())})
        for block, size in weights.blocks.items():
            found[self.compute_devices[block]] += size
        return dict(found)

    def attach(self, model: nn.Module, home: str, transfer: Transfer | None = None, fetch: Fetch = from_host) -> None:
        around = {name: self.cards[0] for name, _ in model.named_children()
                  if not any(block.startswith(f"{name}.") for block in self.blocks)}
        Crossing(model, self.compute_devices | around, home, transfer or self.transfer)

    def renamed(self, names: Mapping[str, str]) -> "Alternating":
        first, second = (names.get(card, card) for card in self.cards)
        return replace(self, cards=(first, second))

    @property
    def concurrency(self) -> int:
        return 2


def alternating(problem: PlacementProblem, machine: Machine, rooms: Rooms) -> Placements | str:
    """Components over the two cards with most room, if each has room for half; otherwise why not."""
    first, second = sorted(rooms, key=lambda name: -rooms[name])[:2]
    found = {weights.component: Alternating((first, second), tuple(weights.blocks)) for weights in problem.open}
    taken = Counter[str]()
    for weights in problem.open:
        taken.update(found[weights.component].share(weights))
    short = [f"{card} has {rooms[card]} bytes for {size}" for card, size in taken.items() if size > rooms[card]]
    return ", ".join(short) if short else {**found}


def test_a_placement_is_a_class_and_a_strategy_and_makes_the_picture_of_the_cpu(
    flux: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LADDER, "alternating", alternating)
    requests = [Request("a red circle", 64, 48, 2, 3.5, seed, 32, seed) for seed in (7, 8)]
    alone = run_all(make_plan(Job("flux", requests, model=flux, dtype="float32", devices="cpu")))
    devices = cards(40_000_000, 40_000_000)
    job = Job("flux", requests, model=flux, dtype="float32", devices=devices, place="denoise=alternating")
    plan = make_plan(job)
    assert str(plan.places["denoise", "transformer"].placement) == f"alternating over {devices[0]}, {devices[1]}"
    assert plan.strategies["denoise"][-1].name == "alternating" and plan.lanes == 2
    made = run_all(plan)
    for picture, expected in zip(made.pictures, alone.pictures, strict=True):
        assert np.array_equal(picture.pixels, expected.pixels)
    denoise = made.stages[1]
    assert denoise.flushed.left == 0 and denoise.lanes == 2
    for card, need in plan.needs["denoise"].items():
        assert need.weights < denoise.peak[card] <= need.total
    # It crosses processes: nothing of it is known outside of its class.
    assert make_plan(Job.from_json(job.to_json())).device_map == plan.device_map == made.device_map


def test_a_placement_that_does_not_fit_says_why_among_the_others(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LADDER, "alternating", alternating)
    model = tiny.flux(tmp_path / "flux", doubles=8, singles=16, heads=8)
    first, second = cards(9_000_000, 9_000_000)
    assert answer(["plan", "flux", "--model", str(model), "--device", first, "--device", second, "--dtype", "float32",
                   "--size", "64x48", "--place", "denoise=alternating"]) == 4
    assert f"alternating: {first} has " in capsys.readouterr().err


def test_the_files_that_name_a_placement_are_those_of_the_recipe() -> None:
    """And each names the kinds that stand beside it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`[a-z].*?`) \| (.*) \|$", text[text.index("These files alone name a kind") :
                                                         text.index("## Add an option")], re.MULTILINE)
    told = {file: set(re.findall(r"`([A-Z]\w+)`", kinds)) or KINDS for files, kinds in rows
            for file in re.findall(r"`([a-z_/]+\.py)`", files)}
    found: dict[str, set[str]] = {}
    for path in (path for package in ("stages", "runner") for path in (ROOT / package).rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {alias.name for node in nodes for alias in node.names} & KINDS
        if names and path.parent.name != "placement":
            found[str(path.relative_to(ROOT))] = names
    assert found.keys() == told.keys() and all(names <= told[path] for path, names in found.items()), found


def test_the_recipes_name_what_is_done_here() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipes = text[text.index("## Add a family") : text.index("## What a promise is")]
    for word in ("`FAMILIES`", "stages/families.py", "tests/tiny_families.py", "tests/test_families.py", "`Placement`",
                 "`entry`", "`compute_devices`", "`share`", "`attach`", "`renamed`", "`LADDER`",
                 "runner/planning/ladder.py", "tests/test_recipes.py", "`README.md`", "`INPUTS`", "`KEYS`",
                 "`_OPTIONS`", "`placed`", "`job_of`", "`facts_of`", "runner/reports/repeat.py"):
        assert word in recipes, word
    for path in re.findall(r"`((?:runner|stages|tests)/[a-z_/]+\.py)`", recipes):
        assert (ROOT / path).is_file(), path
