"""Encode: the prompt becomes embeddings."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import ModularPipeline

from stages.errors import ModelError
from stages.events import Emit, silent
from stages.models.hub import download_line
from stages.models.skeleton import skeleton
from stages.pipeline.build import empty_pipeline
from stages.pipeline.prompt_end import PromptReader
from stages.pipeline.stage import Inputs, Stage
from stages.pipeline.step_hook import StepCheckpoint


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

    def arguments(self, pipe: ModularPipeline, inputs: Inputs) -> dict[str, Any]:
        """The inputs, and the empty negative prompt where one is read."""
        arguments = super().arguments(pipe, inputs)
        if "negative_prompt" in self.blocks.input_names:
            # For most families this is the default; Stable Diffusion 3 makes no negative embeddings without it, and
            # then guides away from the prompt itself, which changes nothing.
            arguments.setdefault("negative_prompt", "")
        return arguments

    def longest(self, prompts: Iterable[str]) -> str:
        """The prompt of which the tokenizers make most tokens; where they cannot be loaded, the one of most bytes."""
        first, *others = sorted({*prompts}, key=lambda prompt: len(prompt.encode()), reverse=True)
        if not others or self.checkpoint.shapes:
            return first
        pipe = empty_pipeline(self.blocks, self.checkpoint)
        pipe.load_components(names=[name for name in pipe.null_component_names if name.startswith("tokenizer")])
        found = [getattr(part, "tokenizer", part) for name, part in pipe.components.items()
                 if name.startswith("tokenizer") and part is not None]

        def count(prompt: str) -> int:
            return sum(len(each(prompt, add_special_tokens=False, truncation=False)["input_ids"]) for each in found)

        longest, most = first, count(first)
        for prompt in others:
            # No tokenizer makes more tokens than bytes, and one for the beginning.
            if (len(prompt.encode()) + 1) * len(found) <= most:
                break
            if (tokens := count(prompt)) > most:
                longest, most = prompt, tokens
        return longest

    @contextmanager
    def request(
        self, pipe: ModularPipeline, arguments: Mapping[str, Any], emit: Emit, resume_from: StepCheckpoint | None
    ) -> Iterator[None]:
        """While the pipeline works on a request inside, what its encoders read is noted; `emit` is told what they do
        not see or know."""
        reader = PromptReader(pipe)
        with reader.listening(), super().request(pipe, arguments, emit, resume_from):
            yield
        # A rehearsal, to which nobody listens, may have no tokenizer.
        for text in () if emit is silent else (*reader.unknown(arguments), *reader.unseen(arguments)):
            emit("warning", {"text": text})


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
