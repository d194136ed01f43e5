"""The artifact keys of a plan, and which of them must be computed."""

from collections.abc import Iterable, Mapping, Sequence

import diffusers
import transformers

from runner.artifacts import Store, key_of
from runner.planning.plan import Plan, inputs_of
from stages.pipeline.stage import Stage

STAGES = ("encode", "denoise", "decode")


def chain(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Per stage, the artifact key of every request: the hash of everything that changes the artifact."""
    keys: dict[str, tuple[str, ...]] = {}
    before: Sequence[str] = [plan.checkpoint.identity] * len(plan.requests)
    for stage in plan.stages:
        types = {c.name: str(plan.places[c.name].dtype) for c in stage.components}
        # A picture decoded in tiles is another picture.
        tile = {"tile": plan.tile} if stage.name == "decode" and plan.tile is not None else {}
        loras = [[lora.digest, lora.scale] for c in stage.components for lora in c.loras]
        added = {"loras": loras} if loras else {}
        # Of ten thousand requests all ask for the same names, and the pipeline blocks answer slowly.
        names = stage.inputs
        versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
        before = keys[stage.name] = tuple(
            key_of({"before": key, "stage": stage.name, "versions": versions, "dtype": types, **tile, **added,
                    "inputs": {n: v for n, v in inputs_of(request).items() if n in names}})
            for key, request in zip(before, plan.requests, strict=True)
        )
    return keys


def midway_key(key: str) -> str:
    """The key under which a request that is midway to the artifact `key` is kept."""
    return key_of({"midway": key})


def missing(
    store: Store, stages: Sequence[Stage], keys: Mapping[str, Sequence[str]], from_stage: str | None
) -> dict[str, list[int]]:
    """Per stage, the requests that must be computed: those whose later artifact is needed and not there."""
    todo: dict[str, list[int]] = {}
    needed: Iterable[int] = range(len(keys[stages[-1].name]))
    for stage in reversed(stages):
        anew = starts(from_stage, stage)
        needed = [i for i in needed if anew or store.get(keys[stage.name][i]) is None]
        if needed and from_stage is not None and not anew:
            raise ValueError(
                f"--from-stage {from_stage} needs the artifacts of {stage.name}, and {len(needed)} are not in the "
                f"store: leave --from-stage out, or name the store with --artifacts"
            )
        todo[stage.name] = needed
    return todo


def starts(from_stage: str | None, stage: Stage) -> bool:
    """Whether a run that starts anew `from_stage` computes `stage` anew."""
    return from_stage is not None and STAGES.index(stage.name) >= STAGES.index(from_stage)
