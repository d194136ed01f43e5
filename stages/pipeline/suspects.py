"""What upstream raises while it goes through a stage of a model whose configs nobody foresaw, told by its fields."""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.models.config_check import explained, odd_fields
from stages.models.files import read_json
from stages.models.skeleton import class_of
from stages.pipeline.stage import Stage


@contextmanager
def suspected(stage: Stage) -> Iterator[None]:
    """While entered, an error of the libraries is a ModelError with the files and fields that may have led to it."""
    path = stage.checkpoint.path
    with explained(f"{path}: what its configs say does not go together in {stage.name}",
                   f"look at {'; '.join(_suspects(stage))}, or use an untouched copy of the model"):
        yield


def _suspects(stage: Stage) -> list[str]:
    """The configs of the parts that the stage has, those alone which have odd fields where any has."""
    names = [spec.name for spec in stage.blocks.expected_components]
    files, odd = [], []
    for part in (stage.checkpoint.components[name] for name in names if name in stage.checkpoint.components):
        config = part.folder / ("config.json" if part.files else "scheduler_config.json")
        if not config.is_file():
            continue
        files.append(f"{part.name}/{config.name}")
        cls = class_of(part)
        # The fields of a model of transformers are those of its config.
        fields = odd_fields(read_json(config), getattr(cls, "config_class", None) or cls)
        if fields:
            odd.append(f"{files[-1]} ({', '.join(fields[:5])})")
    return odd or files
