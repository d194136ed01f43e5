"""Stores, records of runs and LoRA files as targets: what a run reads besides its model."""

import json
import shutil
from pathlib import Path
from random import Random

from tests.fuzz.mutations import change_bytes, change_document, change_safetensors

RUN = "odd"
STAGES = ("encode", "denoise", "decode")


def store(folder: Path) -> None:
    """A store with one run, whose stages have an artifact each."""
    import torch

    from runner import Job, Request
    from runner.artifacts import FolderStore, key_of
    from stages.state import State
    from tests.records import record

    made = FolderStore(folder, warn=print)
    keys = {stage: [key_of({"stage": stage})] for stage in STAGES}
    for stage in STAGES:
        pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)
        tensors = {"pixels": pixels} if stage == "decode" else {"latents": torch.ones(2, 3), "mask": torch.ones(2)}
        made.put(keys[stage][0], stage, State({**tensors, "size": [4, 4]}, {"x": tuple(tensors)}), {"of": "nothing"})
    previews = key_of({"previews": RUN})
    made.put(previews, "preview", State({"step_1": torch.zeros(4, 4, 3, dtype=torch.uint8)}), {"of": "nothing"})
    job = Job("flux", [Request("a fox", 32, 32, 1, 3.5, 1, 32)], model="/nowhere", store="store", run=RUN,
              loras=["style.safetensors"], place=["denoise=sharded"], max_memory="0=1GiB").to_json()
    document = {**record("a fox"), "stages": keys, "job": job, "begun": 1.0, "changes": ["x"],
                "failures": [{"index": 0, "text": "why"}], "previews": {"0": previews}}
    made.save_run(RUN, document)


def damage_record(random: Random, folder: Path) -> str:
    """Change what the record of the run says, and sign it again: whoever may write in a store can."""
    from runner.artifacts import FolderStore

    made = FolderStore(folder, warn=print)
    document = json.loads(json.dumps(made.load_run(RUN)))
    what = change_document(random, document)
    if isinstance(document, dict):
        made.save_run(RUN, {name: value for name, value in document.items() if name not in ("schema", "sha256")})
    return what


def damage_store(random: Random, folder: Path) -> str:
    """Change a file of the store: its bytes, the header of an object, or a document that is signed again."""
    from runner.artifacts.signed_json import write_document

    path = random.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    data, name = path.read_bytes(), path.relative_to(folder)
    if path.suffix == ".json" and random.randrange(3):
        document = json.loads(data)
        for own in ("schema", "sha256"):
            document.pop(own, None)
        what = change_document(random, document)
        path.write_bytes(write_document(document if isinstance(document, dict) else {}))
    elif len(data) > 8 and data[8:9] == b"{" and random.randrange(3):
        what, data = change_safetensors(random, data)
        path.write_bytes(data)
    else:
        what, data = change_bytes(random, data)
        path.write_bytes(data)
    return f"{name}: {what}"


def use_store(folder: Path) -> None:
    """Read all of a store in all of the ways that there are."""
    from runner.artifacts import FolderStore
    from runner.artifacts.audit import audit
    from runner.artifacts.garbage import collect
    from runner.artifacts.inspection import describe, open_artifact
    from runner.engine.session import recorded_job
    from runner.reports.history import describe_run, find_run, readable, summarize
    from runner.reports.notebook import Charts, Memory
    from runner.reports.page import page
    from stages.errors import BadResult, StoreError

    made, refused = FolderStore(folder, readonly=True, warn=print), list[Exception]()
    keys = frozenset(made.keys())

    def listed() -> None:
        for run in made.runs():
            with readable(run):
                summarize(made, run, keys).cells()

    def shown() -> None:
        found = made.stored_run(find_run(made, RUN))
        with readable(found.run):
            facts = summarize(made, found.run, keys, found)
            describe_run(facts, found, dict.fromkeys((key for each in found.record.get("stages", {}).values()
                                                      for key in each), 1))

    def reported() -> None:
        record = made.load_run(find_run(made, RUN))
        with readable(RUN):
            assert "<script>" not in page(RUN, record, made)

    def inspected() -> None:
        for stage in STAGES:
            describe(open_artifact(f"{RUN}:{stage}", made)[1])

    for look in (listed, shown, reported, inspected, lambda: list(audit(made)),
                 lambda: [made.get(key) for key in keys], lambda: recorded_job(made, RUN, str(folder)),
                 lambda: Memory(made, RUN)._repr_html_(), lambda: Charts(made, RUN)._repr_html_(),
                 lambda: collect(FolderStore(folder, warn=print), min_age=0.0, dry_run=True)):
        try:
            look()
        except (StoreError, BadResult) as error:
            refused.append(error)
    if refused:
        raise refused[0]


def model_and_lora(folder: Path) -> None:
    """A tiny FLUX checkpoint, and a LoRA of it in two forms."""
    from safetensors.torch import load_file, save_file

    from tests import tiny

    tiny.flux(folder / "model", doubles=1, singles=1)
    layers = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k")
    tiny.lora(folder / "style.safetensors", folder / "model", layers=layers, alpha=2.0)
    tensors = load_file(folder / "style.safetensors")
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {layers[0]: 2}}
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")},
              folder / "config.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})


def damage_lora(random: Random, folder: Path) -> str:
    """Change one of the LoRAs: names and shapes, what its config says, or bytes."""
    path = folder / random.choice(("style.safetensors", "config.safetensors"))
    what, data = (change_safetensors if random.randrange(4) else change_bytes)(random, path.read_bytes())
    path.write_bytes(data)
    shutil.copy(path, folder / "damaged.safetensors")
    return f"{path.name}: {what}"


def plan_with_lora(folder: Path) -> None:
    """Plan a run with the LoRA that was damaged, or with both where none was."""
    import torch

    from runner import Job, Request, make_plan

    damaged = folder / "damaged.safetensors"
    loras = [damaged] if damaged.exists() else [folder / "style.safetensors", folder / "config.safetensors"]
    make_plan(Job("flux", [Request("x", 32, 32, 1, 3.5, 1, 32)], model=folder / "model", devices=["cpu"],
                  dtype={"": torch.float32}, loras=loras), download=False)
