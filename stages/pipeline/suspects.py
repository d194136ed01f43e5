"""What upstream raises while it goes through a stage of a model whose configs nobody foresaw, told by its fields."""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.models.config_check import explained
from stages.models.skeleton import odd_config
from stages.pipeline.stage import Stage


@contextmanager
def suspected(stage: Stage) -> Iterator[None]:
    """While entered, an error of the libraries is a ModelError with the files and fields that may have led to it."""
    path = stage.checkpoint.path
    with explained(f"{path}: what its configs say does not go together in {stage.name}",
                   lambda: f"look at {'; '.join(_suspects(stage))}, or use an untouched copy of the model"):
        yield


def _suspects(stage: Stage) -> list[str]:
    """The configs of the parts that the stage has, those alone which have odd fields where any has."""
    names = [spec.name for spec in stage.blocks.expected_components]
    files, odd = list[str](), list[str]()
    for name in names:
        part = stage.checkpoint.components.get(name)
        file, fields = odd_config(part) if part else ("", [])
        files += [file] if file else []
        odd += [f"{file} ({', '.join(fields)})"] if fields else []
    return odd or files
