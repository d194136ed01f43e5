"""The options of `runner resume`. Nothing heavy is imported before all of them are checked."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer


@dataclass(frozen=True)
class Resume:
    """The options of `resume`; calling them goes on with the run."""

    run: Annotated[str, typer.Argument(metavar="RUN|last", help="The name of a run.")]
    from_stage: Annotated[
        Literal["encode", "denoise", "decode"] | None, typer.Option("--from", help="Compute anew from there on.")
    ] = None
    artifacts: Annotated[str | None, typer.Option(metavar="DIR", help="Where the run keeps its results.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other pictures that are there.")] = False
    device: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Other devices than before.")] = None
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="Other cards than before.")] = None
    max_memory: Annotated[str | None, typer.Option(metavar="LIMITS", help="Other limits than before.")] = None
    place: Annotated[list[str] | None, typer.Option(metavar="STAGE=WHERE", help="Other places than before.")] = None
    lanes: Annotated[str | None, typer.Option(metavar="N", help="Other lanes than before.")] = None
    allow_offload: Annotated[
        Literal["cpu", "disk"] | None,
        typer.Option(help="Let blocks that fit no card wait in host memory, or on the disk."),
    ] = None
    step_every: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="How often an unfinished denoise is kept.")
    ] = None
    no_degrade: Annotated[
        bool, typer.Option("--no-degrade", help="End at once when a stage runs out of memory.")
    ] = False
    strict: Annotated[bool, typer.Option("--strict", help="Refuse damaged artifacts instead of redoing them.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of paths.")] = False
    log: Annotated[str | None, typer.Option(metavar="FILE", help="Append every event to FILE as a JSON line.")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but errors.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, library warnings included.")] = False

    def __call__(self) -> int:
        from runner.commands.resume import resume

        return resume(self.run, self)
