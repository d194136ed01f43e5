"""Encode: the prompt becomes embeddings."""

from pathlib import Path
from typing import Any

from diffusers import ModularPipeline

from stages.errors import ModelError
from stages.events import Emit
from stages.models.hub import download_line
from stages.models.skeleton import skeleton
from stages.pipeline.stage import Inputs, Stage


class Encode(Stage):
    """The text encoders (and image encoders, where the inputs have images)."""

    name = "encode"

    def prepare(self, pipe: ModularPipeline) -> None:
        """Lend a pipeline that lacks an encoder the denoiser's skeleton: upstream fills in zeros, as wide as it reads.

        Without a denoiser diffusers falls back to a constant.
        """
        denoiser = self.checkpoint.components.get("transformer")
        expected = {spec.name for spec in self.blocks.expected_components}
        if denoiser is not None and "transformer" not in pipe.components and expected & set(self.checkpoint.absent):
            pipe.transformer = skeleton(denoiser)
        for name in (name for name in pipe.components if name.startswith("tokenizer")):
            _check_padding(pipe, name, self.checkpoint.path / name)

    def arguments(self, pipe: ModularPipeline, inputs: Inputs, emit: Emit) -> dict[str, Any]:
        """The inputs, and the empty negative prompt where one is read; `emit` is told of a prompt that will be cut."""
        arguments = super().arguments(pipe, inputs, emit)
        if "negative_prompt" in self.blocks.input_names:
            # For most families this is the default; Stable Diffusion 3 makes no negative embeddings without it, and
            # then guides away from the prompt itself, which changes nothing.
            arguments.setdefault("negative_prompt", "")
        tokenizers = [name for name in pipe.components if name.startswith("tokenizer") and getattr(pipe, name)]
        for name in ("prompt", "negative_prompt"):
            unseen = [unseen_end(pipe, tokenizer, inputs, name) for tokenizer in tokenizers if name in inputs]
            if unseen and all(unseen):
                emit("warning", {"text": f"the {name.replace('_', ' ')} is too long for the model, which does not see "
                                         f"its end: {min(unseen, key=len)!r}"})
        return arguments


def _check_padding(pipe: ModularPipeline, name: str, folder: Path) -> None:
    """ModelError where a tokenizer pads with a token that its encoder has no row for."""
    reader, encoder = getattr(pipe, name), getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
    padding = getattr(getattr(reader, "tokenizer", reader), "pad_token_id", None)
    if padding is None or encoder is None:
        return
    rows = encoder.get_input_embeddings().weight.shape[0]
    if padding >= rows:
        raise ModelError(f"{folder} pads with token {padding}, but its encoder knows {rows}, so they are not of one "
                         f"model; fetch it again: {download_line(folder.parent, (name,))}")


def unseen_end(pipe: ModularPipeline, tokenizer: str, inputs: Inputs, name: str = "prompt") -> str:
    """The end of a prompt that a tokenizer's encoder does not see; upstream cuts it with a line in a log.

    CLIP reads what its tokenizer says (77 tokens), every other encoder as many tokens as the request gives it. In
    FLUX.1 the cut in CLIP is usual, and harmless while T5 reads on.
    """
    reader = getattr(pipe, tokenizer)
    reader = getattr(reader, "tokenizer", reader)  # FLUX.2 has a processor, which holds one.
    limit = reader.model_max_length
    if "CLIP" not in type(reader).__name__ and isinstance(inputs.get("max_sequence_length"), int):
        limit = inputs["max_sequence_length"]
    special = reader.num_special_tokens_to_add()
    tokens = reader(inputs[name], add_special_tokens=False, truncation=False)["input_ids"]
    return str(reader.decode(tokens[limit - special :])) if len(tokens) > limit - special else ""
