"""What would make a library import code that is not its own, fetch it, or read files that nobody checked."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from stages.errors import ModelError
from stages.models.files import check_small, is_small, read_json, visible

_OWN_CLASSES = "use a model of the libraries' own classes"
# Fields that name code or files which are elsewhere.
_REFUSED = ("auto_map", "transformers_weights", "custom_pipelines", "trust_remote_code")
# What else stands in these is the name of a package, or of code on the hub, which transformers imports at once.
_ALLOWED: Mapping[str, Collection[str]] = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}


def refuse_code(folder: Path) -> None:
    """ModelError for what would make a library run code of the model's, or read files that were not checked."""
    for path in visible(folder):
        if path.suffix == ".py" or path.name == "adapter_config.json":
            raise ModelError(f"{path} is refused: custom code and adapters are not run; {_OWN_CLASSES}")
        if is_small(path.name):
            check_small(path)
            if path.name.endswith("config.json"):
                refuse_fields(read_json(path), path)


def refuse_fields(table: Mapping[str, object], path: Path) -> None:
    """ModelError for a field, however deep, by which a library would import or fetch code."""
    for key, value in _fields(table):
        if key in _REFUSED and value:
            raise ModelError(f"{path} is refused for its {key}: custom code and foreign files are not read; "
                             f"{_OWN_CLASSES}")
        allowed = _ALLOWED.get(key.strip("_").removesuffix("_internal"))
        if allowed is None:
            continue
        for name in value.values() if isinstance(value, dict) else (value,):
            if name is not None and name not in allowed:
                raise ModelError(f"{path} is refused for its {key} {name!r:.80}, for which code would be fetched or "
                                 f"imported; write {' or '.join(allowed)} there, or take the field out")


def _fields(table: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Every field of a JSON object and of the objects in it."""
    left: list[object] = [table]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value
