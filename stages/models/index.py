"""What a model folder says it is made of: `model_index.json`, or `modular_model_index.json`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.errors import ModelError
from stages.models.files import Incomplete, read_json

INDEX, MODULAR = "model_index.json", "modular_model_index.json"
# Where there is one, it says which class has the pipeline's blocks.
BLOCKS = "modular_config.json"
LIBRARIES = ("diffusers", "transformers")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Index:
    """What the index of a model says."""

    path: Path
    """Its file."""
    pipeline: str
    """The name of the pipeline class."""
    parts: Mapping[str, tuple[object, object]]
    """The library and the class of every component that the model has, as they stand there."""
    absent: frozenset[str] = frozenset()
    """The names of components that it could have and does without."""

    def part(self, name: str) -> tuple[str, str]:
        """Library and class of a component; ModelError when they are not of the libraries that are trusted."""
        library, class_name = self.parts[name]
        if library in LIBRARIES and isinstance(class_name, str) and _NAME.fullmatch(class_name):
            return str(library), class_name
        raise ModelError(
            f"{self.path} takes {name} from {library!r} ({class_name!r}): custom code is refused, only "
            f"{' and '.join(LIBRARIES)} are allowed; use a model of their own classes"
        )


def read_index(root: Path, source: str) -> Index:
    """The index of a model folder; ModelError when there is none or when it names code from elsewhere."""
    plain, modular = root / INDEX, root / MODULAR
    if not modular.exists():
        if not plain.exists():
            raise _no_index(root)
        return _read(plain, source)
    found = _read(modular, source)
    if not plain.exists():
        return found
    # diffusers reads the modular index where there are both, so the two must not tell different things.
    declared = _read(plain, source)
    for name, part in found.parts.items():
        if declared.parts.get(name, part) != part:
            raise ModelError(f"{root}: {INDEX} and {MODULAR} disagree about {name}; use an untouched copy of the "
                             f"model")
    return declared


def _no_index(root: Path) -> ModelError:
    names = sorted(path.name for path in root.iterdir())
    if not names:
        return Incomplete(f"{root} is empty; fill it: hf download ID --local-dir {root}")
    if inner := [name for name in names if (root / name / INDEX).is_file()]:
        return ModelError(f"{root} has no {INDEX}, but {inner[0]} in it has: `model={root / inner[0]}`")
    if (root.parent / INDEX).is_file():
        return ModelError(f"{root} is one component of a model; give the whole: `model={root.parent}`")
    single = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    what = f" (a single file such as {single[0]} cannot be run)" if single else ""
    return Incomplete(f"{root} has no {INDEX}, so it is no model in the diffusers layout{what}; "
                      f"give a folder with {INDEX} and one folder per component")


def _read(path: Path, source: str) -> Index:
    table = read_json(path)
    pipeline = table.get("_class_name")
    if not isinstance(pipeline, str) or not _NAME.fullmatch(pipeline):
        raise ModelError(f"{path} names the pipeline {pipeline!r}: custom code is refused; use a pipeline of "
                         f"diffusers")
    if "auto_map" in table:
        raise ModelError(f"{path} has an auto_map: custom code is refused; use a model of diffusers' own classes")
    parts = {name: _part(path, name, value, source) for name, value in table.items() if _is_part(name, value)}
    absent = frozenset(name for name, value in table.items() if isinstance(value, list) and value[:2] == [None, None]
                       and name not in parts)
    return Index(path, pipeline, parts, absent)


def _is_part(name: str, value: object) -> bool:
    if name.startswith("_") or not isinstance(value, list) or len(value) not in (2, 3):
        return False
    if len(value) == 3:
        return isinstance(value[2], dict)
    # A list of numbers may be anything; what names a library or a class is meant to be a part.
    return any(isinstance(item, str) for item in value)


def _part(path: Path, name: str, value: object, source: str) -> tuple[object, object]:
    assert isinstance(value, list)
    if not _NAME.fullmatch(name):
        raise ModelError(f"{path} names a component {name!r}, which is no plain name: use an untouched copy")
    return _modular(path, name, value, source) if len(value) == 3 else (value[0], value[1])


def _modular(path: Path, name: str, value: list[object], source: str) -> tuple[object, object]:
    library, class_name, spec = value
    assert isinstance(spec, dict)
    repo = spec.get("pretrained_model_name_or_path")
    foreign = repo not in (None, "", source) and not (path.parent / name).is_dir()
    if foreign or spec.get("subfolder") != name or spec.get("variant"):
        raise ModelError(
            f"{path} takes {name} from {repo!r}, folder {spec.get('subfolder')!r}, variant {spec.get('variant')!r}; "
            f"only models whose components lie in their own folders are run: save a copy with save_pretrained"
        )
    hint = spec.get("type_hint")
    if library is None and isinstance(hint, list) and len(hint) == 2:
        return hint[0], hint[1]
    return library, class_name
