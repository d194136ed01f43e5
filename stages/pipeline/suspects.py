"""What upstream raises while it goes through a stage of a model whose configs nobody foresaw, told by its fields."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import diffusers
import transformers
from torch import nn

from stages.models.config_check import explained
from stages.models.skeleton import odd_config
from stages.pipeline.stage import Stage


@contextmanager
def suspected(stage: Stage) -> Iterator[None]:
    """While entered, an error of the libraries is a ModelError with the files and fields that may have led to it.

    One that did not come by way of the model itself may be the libraries' own, and says so.
    """
    path = stage.checkpoint.path
    with explained(f"{path}: {stage.name} cannot be gone through", lambda: _advice(stage)):
        yield


def _advice(stage: Stage) -> str:
    files = "; ".join(_suspects(stage))
    if _came_by_a_model(sys.exception()):
        return f"what its configs say does not go together: look at {files}, or use an untouched copy of the model"
    return (f"look at {files}; where the model is untouched, it is diffusers {diffusers.__version__} or transformers "
            f"{transformers.__version__} that cannot: install what they ask for, or others")


def _came_by_a_model(error: BaseException | None) -> bool:
    """Whether a module was at work when an error was raised, and has all packages that it needs."""
    trace = None if error is None else error.__traceback__
    at_work = (frame.f_locals.get("self") for frame, _ in walk_tb(trace))
    return not isinstance(error, ImportError) and any(isinstance(each, nn.Module) for each in at_work)


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
