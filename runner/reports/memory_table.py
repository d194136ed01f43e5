"""What memory each stage of a run took: before it, at most, and after it, against the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """Bytes on one device in one stage. On the host they are those of the whole process, Python and torch included."""

    stage: str
    device: str
    before: int
    planned: int
    peak: int
    after: int


def measured(record: Mapping[str, Any]) -> list[Measured]:
    """A line for each stage and device of a run's record; of a machine with cards, its cards alone."""
    timeline, plan = record["timeline"], record["plan"]
    names = timeline["devices"] or ["cpu"]
    found = []
    for stage, peaks in timeline["peaks"].items():
        samples = [sample for sample in timeline["samples"] if sample[1] == stage]
        for at, device in enumerate(names):
            need = plan["stages"][stage].get(device, {"weights": 0, "activations": 0})
            found.append(Measured(stage, device, _used(samples, at, device)[0], need["weights"] + need["activations"],
                                  peaks[device], _used(samples, at, device)[-1]))
    return found


def _used(samples: Sequence[Sequence[Any]], at: int, device: str) -> list[int]:
    return [sample[4] if device == "cpu" else sample[3][at] for sample in samples]
