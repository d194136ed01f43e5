"""The model families that have a name on the command line: pure data, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a family is run with unless the user says otherwise.

    `guidance` is None where the model takes no guidance; `text_tokens` is the longest prompt in tokens; `size` is
    (width, height) in pixels; `patch` is what the transformer packs of the latents along an edge. `requires` names
    modules that upstream imports only when they are installed but calls all the same, so they are checked before
    anything is downloaded.
    """

    name: str
    repo: str
    pipeline: str
    steps: int
    guidance: float | None
    text_tokens: int
    size: tuple[int, int]
    requires: tuple[str, ...] = ()
    patch: int = 2


FAMILIES = {
    family.name: family
    for family in (
        Family("flux", "black-forest-labs/FLUX.1-dev", "FluxPipeline", 28, 3.5, 512, (1024, 1024)),
        Family("flux-schnell", "black-forest-labs/FLUX.1-schnell", "FluxPipeline", 4, None, 256, (1024, 1024)),
        Family("demo", "demo", "FluxPipeline", 16, None, 24, (128, 128)),
    )
}
