"""Which family a model is of, from its name or from what its own index says."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from runner.text import shown
from stages.errors import InvalidInput, ModelError
from stages.families import FAMILIES, Family, is_unsupported
from stages.models.checkpoint import Checkpoint, find
from stages.models.files import read_json
from stages.models.hub import is_id
from stages.models.index import INDEX
from stages.wording import kind_of, with_article


def family_of(model: str, revision: str | None) -> tuple[str, str | None]:
    """The family that is meant, and the model where it is not the family's own.

    `model` is the name of a family, a hub id, or a folder. Raises InvalidInput for what is none of them, and
    ModelError for a model that cannot be read or that no family runs.
    """
    if (family := family_named(model)) is not None:
        return family.name, None
    if not is_id(model) and not os.path.exists(os.path.expanduser(model)):
        raise unknown(model)
    return _by_its_index(model, revision).name, model


def family_named(model: str) -> Family | None:
    """The family that is meant by its name or the hub id of its own model; None for a folder, or another model."""
    return next((family for family in FAMILIES.values()
                 if model.lower() in (family.name, family.repo.lower()) and not os.path.exists(model)), None)


def as_name(model: Any) -> str:
    """The name or the path that somebody gave for a model, as text; InvalidInput for what is neither."""
    if not isinstance(model, str | os.PathLike):
        raise InvalidInput(f"{kind_of(model)} is no model -> a family such as \"flux\", a hub id or a folder")
    return os.fspath(model)


def is_model_folder(name: str) -> bool:
    """Whether it is the folder of a model."""
    return (Path(name) / INDEX).is_file()


def unknown(model: str) -> InvalidInput:
    """The error for a name that is no family, no hub id and no folder."""
    if "/" not in model and is_unsupported(model):
        return InvalidInput(f"{shown(model)} is not supported -> choose from {', '.join(FAMILIES)}, or another model "
                            f"of one of these")
    by_name = {family.repo.rpartition("/")[2].lower(): family.repo for family in FAMILIES.values()}
    by_name |= {name.lower(): name for family in FAMILIES.values() for name in (family.repo, family.name)}
    # What is no more than the beginning of a name is not close to it.
    begun = [name for name in by_name if model and name.startswith(model.lower())]
    near = list(dict.fromkeys(by_name[name] for name in get_close_matches(model.lower(), by_name, 3) or begun[:3]))
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(FAMILIES)}, or give a hub id"
    return InvalidInput(f"there is no family and no model folder {shown(model)} -> {hint}")


def _by_its_index(model: str, revision: str | None) -> Family:
    """The family of the pipeline class that a model names; of several, the one that it is most like."""
    named = find(model, revision=revision, components=())
    pipeline = named.pipeline.replace("ModularPipeline", "Pipeline")
    fitting = [family for family in FAMILIES.values() if family.pipeline == pipeline and family.repo != "demo"]
    if not fitting:
        runs = ", ".join(dict.fromkeys(family.pipeline for family in FAMILIES.values()))
        kind = with_article(named.pipeline)
        raise ModelError(f"{model} is not supported: it is {kind}, which no family here runs -> choose "
                         f"from {', '.join(FAMILIES)}, or a model of {runs}")
    if len(fitting) == 1:
        return fitting[0]
    guided = _guided(named, model, revision)
    return next((family for family in fitting if (family.guidance is not None) == guided), fitting[0])


def _guided(named: Checkpoint, model: str, revision: str | None) -> bool:
    """Whether a model takes guidance, where families that share a class differ in that: distilled ones take none."""
    index = named.path / INDEX
    if index.is_file() and (distilled := read_json(index).get("is_distilled")) is not None:
        return not distilled
    denoiser = find(model, revision=revision, components=("transformer",), weights=False).components["transformer"]
    return read_json(denoiser.folder / "config.json").get("guidance_embeds") is not False
