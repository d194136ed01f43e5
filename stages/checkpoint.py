"""A model on disk: found, complete and of the right kind, before anything heavy is imported or loaded."""

import difflib
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages import hub
from stages.errors import LoadError
from stages.families import FAMILIES, Family
from stages.files import Incomplete, head, read_json, refetch, size_of
from stages.shards import STEMS, pickled, read_header, weight_files

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
SMALL = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
WHOLE = 64 * 2**20
_WEIGHTLESS = re.compile(r"(Tokenizer|TokenizerFast|Processor|ProcessorFast|FeatureExtractor|Scheduler)$")
_VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"tekken.json"})


@dataclass(frozen=True)
class Component:
    """One part of a model: its folder, the class that reads it, and its safetensors files if it has weights."""

    name: str
    library: str
    class_name: str
    folder: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was checked; `identity` names its content and goes into artifact keys."""

    path: Path
    source: str
    identity: str
    pipeline: str
    components: Mapping[str, Component]


def find(
    model: str | Path, *, revision: str | None = None, components: Collection[str] | None = None
) -> Checkpoint:
    """The model as a checked local folder; from the hub, only what `components` need is downloaded.

    `components` defaults to all of the model's; `()` reads nothing but the index, enough for `check`.
    Raises LoadError when the model is not found, not complete, damaged, or would run code of its own.
    """
    local = _folder(model)
    if local is not None:
        if revision is not None:
            raise ValueError(f"--revision {revision} is for models of the hub, but {model} is a folder; leave it out")
        return _survey(local, str(model), None, components)
    source = str(model)
    cached = hub.cached(source, revision)
    if cached is not None:
        try:
            return _survey(cached, source, f"{source}@{cached.name}", components)
        except Incomplete as missing:
            hub.refuse_offline(source, revision, missing)
    snapshot = hub.fetch(source, revision)
    hub.fetch_components(source, snapshot, _declared(snapshot, source, components))
    return _survey(snapshot, source, f"{source}@{snapshot.name}", components)


def check(checkpoint: Checkpoint, *, family: Family) -> None:
    """LoadError when the checkpoint is not of the family, naming both and what would work."""
    if checkpoint.pipeline.replace("ModularPipeline", "Pipeline") == family.pipeline:
        return
    fitting = [other.name for other in FAMILIES.values() if other.pipeline == checkpoint.pipeline]
    step = f"run the family {fitting[0]} instead, or" if fitting else "no family here runs it;"
    raise LoadError(
        f"{checkpoint.source} is a {checkpoint.pipeline}, but family {family.name} runs a {family.pipeline}; "
        f"{step} give a {family.pipeline} model, such as --model {family.repo}"
    )
