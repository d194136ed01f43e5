"""The pipeline of a stage, set up: the same for a run, for its lanes, for an estimate and for a recording."""

import logging
from collections.abc import Callable, Mapping

from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, SequentialPipelineBlocks

from stages.errors import ModelError
from stages.models.checkpoint import Checkpoint

# Every nesting level of blocks logs the whole traceback of an error that is raised all the same.
logging.getLogger(ModularPipeline.__module__).addFilter(lambda record: "Error in block" not in record.getMessage())


def empty_pipeline(blocks: SequentialPipelineBlocks, checkpoint: Checkpoint) -> ModularPipeline:
    """The pipeline of these blocks with nothing loaded."""
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

    With `tokenizer`, what it makes takes the place of tokenizers and processors that cannot be loaded here. Raises
    ModelError for anything else that cannot.
    """
    pipe = empty_pipeline(blocks, checkpoint)
    pipe.update_components(**components)
    for name in [name for name in pipe.null_component_names if name in pipe.pretrained_component_names]:
        # load_components reads a dict as "per component" and hands plain values to every tokenizer, so it is called
        # for one name at a time; it only logs its failures, so the result is looked at.
        pipe.load_components(names=[name])
        if name not in pipe.null_component_names:
            continue
        if tokenizer is None or not ("tokenizer" in name or "processor" in name):
            raise ModelError(f"{name} of {checkpoint.source} could not be loaded: look at the files in "
                             f"{checkpoint.path / name}")
        pipe.update_components(**{name: tokenizer()})
    return pipe
