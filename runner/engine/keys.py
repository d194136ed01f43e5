"""The artifact keys of a plan, and which of them must be computed."""

from collections.abc import Iterable, Mapping, Sequence

import diffusers
import transformers

from runner.artifacts import Store, key_of
from runner.job import STAGES
from runner.planning.plan import Plan
from runner.request import FilledRequest
from stages.errors import InvalidInput
from stages.pipeline.stage import Stage, guides
from stages.placement.tiling import Tiling


def artifact_keys(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Per stage, the artifact key of every request: the hash of everything that changes the artifact."""
    keys: dict[str, tuple[str, ...]] = {}
    checkpoint = plan.checkpoint
    before: Sequence[str] = [checkpoint.unscheduled or checkpoint.identity] * len(plan.requests)
    for stage in plan.stages:
        types = {name: str(place.dtype) for name, place in plan.places_of(stage.name).items()}
        tiling = plan.tiling if stage.name == "decode" else None
        loras = [[lora.digest, lora.scale] for c in stage.components for lora in c.loras]
        added: dict[str, object] = {"loras": loras} if loras else {}
        if stage.schedules:
            added["model"] = checkpoint.identity
            if checkpoint.scheduler is not None:
                added["scheduler"] = checkpoint.scheduler.to_json()
        # Of ten thousand requests all ask for the same names, and the pipeline blocks answer slowly.
        names = stage.inputs
        # Before the denoise, a guider only says whether there are negative embeddings.
        guiding = stage.guided and not stage.schedules and "guidance_scale" not in stage.blocks.input_names
        versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
        before = keys[stage.name] = tuple(
            key_of({"before": key, "stage": stage.name, "versions": versions, "dtype": types, **added,
                    **_tile(tiling, request),
                    "inputs": {name: guides(request.inputs) if guiding and name == "guidance_scale" else value
                               for name, value in request.inputs.items() if name in names}})
            for key, request in zip(before, plan.requests, strict=True)
        )
    return keys


def _tile(tiling: Tiling | None, request: FilledRequest) -> dict[str, int]:
    """What the key of a picture has that is decoded in tiles: it is another one than the whole."""
    tile = None if tiling is None else tiling.tile(request.width, request.height)
    return {} if tile is None else {"tile": tile}


def checkpoint_key(key: str) -> str:
    """The key under which the unfinished denoise of the artifact `key` is kept."""
    return key_of({"midway": key})


def missing(
    store: Store, stages: Sequence[Stage], keys: Mapping[str, Sequence[str]], from_stage: str | None
) -> dict[str, list[int]]:
    """Per stage, the requests that must be computed: those whose later artifact is needed and not there.

    Raises InvalidInput where a run from `from_stage` on lacks what that stage reads.
    """
    todo: dict[str, list[int]] = {}
    needed: Iterable[int] = range(len(keys[stages[-1].name]))
    for stage in reversed(stages):
        anew = computed_anew(from_stage, stage.name)
        needed = [i for i in needed if anew or store.get(keys[stage.name][i]) is None]
        if needed and from_stage is not None and not anew:
            raise InvalidInput(
                f"`from_stage={from_stage}` needs the artifacts of {stage.name}, and {len(needed)} are not in the "
                f"store: leave `from_stage` out, or give the `store` that has them"
            )
        todo[stage.name] = needed
    return todo


def computed_anew(from_stage: str | None, stage: str) -> bool:
    """Whether a run from `from_stage` on computes `stage` whatever the store has."""
    return from_stage is not None and STAGES.index(stage) >= STAGES.index(from_stage)
