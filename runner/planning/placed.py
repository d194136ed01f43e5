"""What came of placing the stages of a run: where each component is, and what that takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from runner.planning.ladder import Strategy
from runner.planning.precompute import TableSaving
from runner.planning.work import Work
from stages.models.weights import Weights
from stages.placement.placement import Place

# The names of a stage and a component: one may stand in two stages, as the VAE of pipelines that take pictures does.
Part = tuple[str, str]
Tried = tuple[Strategy, ...]


@dataclass(frozen=True)
class Need:
    """Bytes on a device during a stage."""

    weights: int
    """Of the weights that it holds."""
    activations: int
    """Of all else, at most."""
    copy_check: int = 0
    """Of the check of copies between cards, which is over before there are weights."""

    @property
    def running(self) -> int:
        """What the stage takes once it is loaded."""
        return self.weights + self.activations

    @property
    def total(self) -> int:
        """The most at any time."""
        return max(self.running, self.copy_check)


@dataclass
class Placed:
    """The stages placed so far; what is said by part is keyed by (stage, component)."""

    places: dict[Part, Place] = field(default_factory=dict)
    """Where each component goes, by part."""
    weights: dict[Part, Weights] = field(default_factory=dict)
    """What each component weighs, by part."""
    needs: dict[str, dict[str, Need]] = field(default_factory=dict)
    """Bytes by stage and device."""
    strategies: dict[str, Tried] = field(default_factory=dict)
    """What was tried, by stage; the last one is taken."""
    reasons: dict[Part, str] = field(default_factory=dict)
    """Why a component has its type."""
    savings: dict[str, TableSaving] = field(default_factory=dict)
    """What the modulation table saves, by component."""
    lanes: int = 1
    """Requests that are denoised at a time."""
    reads: dict[str, int] = field(default_factory=dict)
    """Bytes that a pass reads from the disk, by stage."""
    work: dict[str, Work] = field(default_factory=dict)
    """What the largest picture computes, copies and reads, by stage."""


def concurrency(places: Mapping[str, Place]) -> int:
    """How many requests in flight keep the devices of a stage busy."""
    (placement, *others) = (place.placement for place in places.values())
    return 1 if others else placement.concurrency
