"""The pipeline of a stage, set up: the same for a run, for its lanes, for an estimate and for a recording."""

import logging
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, SequentialPipelineBlocks

from stages.errors import ModelError
from stages.models.checkpoint import Checkpoint
from stages.models.config_check import explained
from stages.models.hub import download_line
from stages.models.skeleton import class_of, odd_config
from stages.pipeline.scheduler import exchanged

_CLASS = re.compile(r"<class '[\w.]*?(\w+)'>")
# Every nesting level of blocks logs the whole traceback of an error that is raised all the same, and load_components
# that of one which is asked for here.
logging.getLogger(ModularPipeline.__module__).addFilter(
    lambda record: not any(text in record.getMessage() for text in ("Error in block", "Failed to create component")))


def empty_pipeline(blocks: SequentialPipelineBlocks, checkpoint: Checkpoint) -> ModularPipeline:
    """The pipeline of these blocks with nothing loaded."""
    with explained(f"diffusers cannot read the index of {checkpoint.path}", "use an untouched copy of the model"):
        pipe = blocks.init_pipeline(str(checkpoint.path))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_pipeline(
    blocks: SequentialPipelineBlocks,
    checkpoint: Checkpoint,
    components: Mapping[str, object],
    tokenizer: Callable[[], object] | None = None,
) -> ModularPipeline:
    """The pipeline of these blocks around these components, with what has no weights (tokenizers, schedulers) loaded.

    With `tokenizer`, what it makes takes the place of tokenizers and processors that need a package which is not here.
    Raises ModelError for anything else that cannot be loaded.
    """
    pipe = empty_pipeline(blocks, checkpoint)
    pipe.update_components(**components)
    known = set(pipe.pretrained_component_names) - set(checkpoint.absent)
    for name in [name for name in pipe.null_component_names if name in known]:
        if checkpoint.shapes and tokenizer is not None and _reads(name):
            # Shapes have no vocabulary.
            pipe.update_components(**{name: tokenizer()})
            continue
        # load_components reads a dict as "per component" and hands plain values to every tokenizer, so it is called
        # for one name at a time; it only logs its failures, so the result is looked at.
        with explained(f"{checkpoint.path / name} cannot be read", _again(checkpoint, name)):
            pipe.load_components(names=[name])
        if name not in pipe.null_component_names:
            continue
        needs_package = _refuse_damaged(checkpoint, name)
        if tokenizer is None or not needs_package or not _reads(name):
            kind = checkpoint.components[name].class_name
            raise ModelError(f"{name} of {checkpoint.source}, a {kind}, could not be loaded ({_cause(pipe, name)}) -> "
                             f"look at {checkpoint.path / name}")
        pipe.update_components(**{name: tokenizer()})
    if checkpoint.scheduler is not None and getattr(pipe, "scheduler", None) is not None:
        pipe.update_components(scheduler=exchanged(pipe.scheduler, checkpoint.scheduler))
    return pipe


def _reads(name: str) -> bool:
    """Whether a component of this name reads prompts: a tokenizer, or a processor with one."""
    return "tokenizer" in name or "processor" in name


def told(error: BaseException) -> str:
    """An error of a library in a line; where its text says little, with the source line that raised it."""
    text = _CLASS.sub(r"\1", " ".join(str(error).split()))
    frames = traceback.extract_tb(error.__traceback__)
    if frames and (not text or isinstance(error, LookupError)):
        text = f"{text} in {frames[-1].line}" if text else str(frames[-1].line)
    # In our messages, what stands in backquotes is of the job.
    return f"{type(error).__name__}: {text:.300}".rstrip(": ").replace("`", "'")


def _cause(pipe: ModularPipeline, name: str) -> str:
    """Why a component does not load, which load_components only logs."""
    try:
        pipe.get_component_spec(name).load()
    except Exception as error:  # Anything: it is a library's constructor with a model's config.
        # It raises one of its own in the place of the constructor's.
        return told(error.__context__ or error)
    return "without an error"
def _again(checkpoint: Checkpoint, name: str) -> str:
    return f"fetch it again: {download_line(checkpoint.path, (name,))}"


def _refuse_damaged(checkpoint: Checkpoint, name: str) -> str:
    """The package that loading a part without weights asks for, if it is that; ModelError with any other reason.

    The pipeline writes reasons to a log alone, so the part is loaded once more.
    """
    part = checkpoint.components.get(name)
    if part is None:
        raise ModelError(f"{checkpoint.path} names no {name}, which {checkpoint.pipeline} needs; use a model that is "
                         f"whole")
    cls: Any = class_of(part)
    file, fields = odd_config(part)
    odd = f" with {', '.join(fields)} in {file}" if fields else ""
    with explained(f"{part.folder}{odd} cannot be read as {part.class_name}",
                   _again(checkpoint, name)):
        try:
            cls.from_pretrained(part.folder)
        except ImportError as error:
            return f" ({' '.join(str(error).split()):.200})"
    return ""
