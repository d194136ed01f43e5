"""Encode: the prompt becomes embeddings."""

from stages.stage import Stage


class Encode(Stage):
    """The text encoders (and image encoders, where the inputs have images)."""

    name = "encode"
