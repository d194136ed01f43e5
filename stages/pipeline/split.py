"""A model folder and the names of its inputs, split into Encode, Denoise and Decode.

One rule covers every family that diffusers describes as pipeline blocks: what stands before the top-level block
`denoise` encodes, what stands after it decodes.
"""

import importlib
from collections.abc import Collection, Iterable, Mapping

import diffusers
from diffusers import ModularPipeline
from diffusers.modular_pipelines.modular_pipeline import (
    MODULAR_PIPELINE_MAPPING,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)

from stages.errors import InvalidInput, ModelError
from stages.models.checkpoint import Checkpoint
from stages.models.files import read_json
from stages.models.index import INDEX, MODULAR
from stages.models.skeleton import class_of
from stages.pipeline.decode import Decode
from stages.pipeline.denoise import Denoise
from stages.pipeline.encode import Encode
from stages.pipeline.stage import Stage

# An encoder without which a pipeline draws by its others, though diffusers does not call it optional; its tokenizer.
_DISPENSABLE = {"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")}

def split(checkpoint: Checkpoint, inputs: Collection[str]) -> tuple[Encode, Denoise, Decode]:
    """The three stages of `checkpoint` for requests that give `inputs`.

    Inputs have diffusers' names, such as "prompt"; "seed" stands for a generator. Raises ModelError where diffusers
    has no pipeline blocks for the model, or they make no images, or a component is of a class that there is not, and
    InvalidInput where an input is read by no stage.
    """
    for component in checkpoint.components.values():
        class_of(component)
    groups = _groups(_blocks(checkpoint), inputs)
    decode = Decode(checkpoint, groups["decode"], reads=frozenset(), tags=frozenset())
    if "images" not in decode.blocks.output_names:
        made = " and ".join(decode.blocks.output_names)
        raise ModelError(f"{checkpoint.pipeline} makes {made}, not images: choose a model that makes images")
    denoise = Denoise(checkpoint, groups["denoise"], *_reads([decode]))
    encode = Encode(checkpoint, groups["encode"], *_reads([denoise, decode]))
    for stage in (encode, denoise, decode):
        _check_whole(stage)
    unread = sorted(set(inputs) - encode.inputs - denoise.inputs - decode.inputs)
    if unread:
        raise InvalidInput(f"{checkpoint.pipeline} has no use for {', '.join(unread)}: leave it out")
    return encode, denoise, decode


def _check_whole(stage: Stage) -> None:
    """ModelError where the index names too few of the parts that a stage is made of."""
    there, spared = stage.checkpoint.components, _spared(stage.checkpoint)
    for spec in stage.blocks.expected_components:
        left_out = spec.name not in there and spec.name not in spared
        if left_out and spec.default_creation_method == "from_pretrained":
            raise ModelError(f"{stage.checkpoint.path} names no {spec.name}, which {stage.checkpoint.pipeline} needs "
                             f"for {stage.name}; use a model that is whole")
    if not stage.components:
        raise ModelError(f"{stage.checkpoint.path} names nothing with weights for {stage.name}; use a model that is "
                         f"whole")


def _spared(checkpoint: Checkpoint) -> set[str]:
    """The parts that the index says are absent, and that the pipeline can do without."""
    absent = set(checkpoint.absent)
    optional = set(getattr(getattr(diffusers, checkpoint.pipeline, None), "_optional_components", ()))
    encoder, tokenizer = _DISPENSABLE.get(checkpoint.pipeline, ("", ""))
    return absent & (optional | {encoder, tokenizer} if encoder in absent else optional)


def require(modules: Iterable[str]) -> None:
    """Raise ModelError unless every module imports: upstream calls some without importing them."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ModelError(f"this family needs the package {name!r}: pip install {name}") from None


def _blocks(checkpoint: Checkpoint) -> ModularPipelineBlocks:
    blocks, cause = None, None
    try:
        blocks = _pipeline(checkpoint).blocks
    except (ValueError, AttributeError, KeyError) as error:
        cause = error
    if blocks is None or "denoise" not in blocks.sub_blocks:
        raise ModelError(
            f"diffusers {diffusers.__version__} has no modular blocks for {checkpoint.pipeline}, so it cannot be "
            f"split into stages: choose a model of another family"
        ) from cause
    return blocks


def _pipeline(checkpoint: Checkpoint) -> ModularPipeline:
    """The pipeline that diffusers makes of the model, with nothing loaded."""
    # To find the class by a plain index, from_pretrained imports every pipeline that there is.
    others = (MODULAR, ModularPipelineBlocks.config_name)
    plain = not any((checkpoint.path / file).exists() for file in others)
    name = _chosen(checkpoint.pipeline, read_json(checkpoint.path / INDEX)) if plain else None
    if name is None:
        return ModularPipeline.from_pretrained(checkpoint.path)
    pipeline: ModularPipeline = getattr(diffusers, name)()
    return pipeline


def _chosen(pipeline: str, index: Mapping[str, object]) -> str | None:
    """The modular class for a usual one and its index, if diffusers' table has it under the usual one's name."""
    named = pipeline.replace("Pipeline", "ModularPipeline")
    choose = next((choose for choose in MODULAR_PIPELINE_MAPPING.values() if choose() == named), None)
    return None if choose is None else str(choose(dict(index)))


def _groups(blocks: ModularPipelineBlocks, inputs: Collection[str]) -> dict[str, SequentialPipelineBlocks]:
    """The blocks that run for these inputs, by stage."""
    order = list(blocks.sub_blocks)
    border = order.index("denoise")
    groups: dict[str, dict[str, ModularPipelineBlocks]] = {"encode": {}, "denoise": {}, "decode": {}}
    for name, block in blocks.get_execution_blocks(**dict.fromkeys(inputs, True)).sub_blocks.items():
        index = order.index(name.split(".")[0])
        stage = "encode" if index < border else "denoise" if index == border else "decode"
        groups[stage][name] = block
    return {stage: SequentialPipelineBlocks.from_blocks_dict(group) for stage, group in groups.items()}


def _reads(later: Iterable[Stage]) -> tuple[frozenset[str], frozenset[str]]:
    """The names, and the tags, under which later stages read values."""
    params = [param for stage in later for param in stage.blocks.inputs]
    names = frozenset(param.name for param in params if param.name)
    return names, frozenset(param.kwargs_type for param in params if param.kwargs_type)
