"""How many workers a cluster has for each stage, and what each of them is given."""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.errors import DoesNotFit
from stages.wording import counted

GROUP = 4
# Workers without cards compute in as many threads as one process would; Ray only counts what it may start.
_CORES = 0.25


@dataclass(frozen=True)
class Pool:
    """The workers of a stage."""

    size: int
    """How many there are."""
    cards: int
    """Cards of each."""
    cores: float = _CORES
    """Cores of each, as Ray counts them."""


@dataclass(frozen=True)
class Pools:
    """The workers of a run."""

    by_stage: Mapping[str, Pool]
    """Those of each stage."""
    together: bool
    """Whether all stages are at work side by side; otherwise one is done before the next begins."""


def pools(cards: Mapping[str, int], there: int, requests: int) -> Pools:
    """The workers for so many requests, where a worker of a stage takes `cards` and the cluster has so many `there`.

    With cards for one worker of each stage, all stages work side by side, and what is left goes to the denoise. Raises
    DoesNotFit where there are too few for one stage alone.
    """
    if not any(cards.values()):
        return Pools(dict.fromkeys(cards, Pool(1, 0)), together=True)
    stage, most = max(cards.items(), key=lambda item: item[1])
    if most > there:
        raise DoesNotFit(f"{stage} takes {counted(most, 'card')}, and the cluster has {there} -> wait for nodes, or "
                        f"use --max-memory or --allow-offload cpu")
    spare = there - sum(cards.values())
    if spare < 0:
        return Pools({name: Pool(min(there // count, requests), count) for name, count in cards.items()}, False)
    found = {name: Pool(1, count) for name, count in cards.items()}
    if "denoise" in cards:
        more = min(1 + spare // cards["denoise"], requests)
        found["denoise"] = Pool(more, cards["denoise"])
    return Pools(found, together=True)


def groups(requests: int, workers: int) -> list[range]:
    """The requests in groups of neighbors that a worker does at a time: few, and no fewer groups than workers."""
    size = max(1, min(GROUP, requests // max(1, workers)))
    return [range(start, min(start + size, requests)) for start in range(0, requests, size)]
