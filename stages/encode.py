"""Encode: the prompt becomes embeddings."""

from typing import Any

from stages.stage import Emit, Inputs, Stage


class Encode(Stage):
    """The text encoders (and image encoders, where the inputs have images)."""

    name = "encode"

    def arguments(self, inputs: Inputs, emit: Emit) -> dict[str, Any]:
        """The inputs, and the empty negative prompt where one is read."""
        arguments = super().arguments(inputs, emit)
        if "negative_prompt" in self.blocks.input_names:
            # For most families this is the default; Stable Diffusion 3 makes no negative embeddings without it, and
            # then guides away from the prompt itself, which changes nothing.
            arguments.setdefault("negative_prompt", "")
        return arguments
