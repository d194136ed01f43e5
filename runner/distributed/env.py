"""Ranks: processes that share one run, each with cards of its own and a share of the pictures by global index.

A rank needs nothing of another to do its work: names and seeds follow from the global index, and finished stages are
in the store that all of them use. Ranks on several hosts therefore need one store that all hosts see.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from stages.errors import InvalidInput

# The variable with which a rank that `spawn` started finds its pipe.
PIPE = "STAGERUN_PIPE"


@dataclass(frozen=True)
class Rank:
    """One of several processes."""

    rank: int
    """Its number among all."""
    size: int
    """How many there are."""
    local: int
    """Its number among those of its host."""
    local_size: int
    """How many are on its host."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank that torchrun or accelerate launch made of this process; None where it is alone.

    Raises what `rank_of` raises.
    """
    found = rank_of(environment)
    return found if found is not None and found.size > 1 else None


def rank_of(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank that the environment makes of this process, be it the only one; None where it says nothing of ranks.

    Raises InvalidInput where RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE do not go together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not environment.get("RANK") or not environment.get("WORLD_SIZE"):
        return None
    variables = {name: environment.get(name, "") for name in names}
    variables["LOCAL_RANK"] = variables["LOCAL_RANK"] or variables["RANK"]
    variables["LOCAL_WORLD_SIZE"] = variables["LOCAL_WORLD_SIZE"] or variables["WORLD_SIZE"]
    text = " ".join(f"{name}={value}" for name, value in variables.items())
    if not all(value.isdecimal() for value in variables.values()):
        raise InvalidInput(f"{text} are not whole numbers -> start ranks with torchrun, accelerate launch or `ranks`")
    found = Rank(*(int(variables[name]) for name in names))
    if not (found.rank < found.size and found.local < found.local_size <= found.size):
        raise InvalidInput(f"{text} do not go together -> start ranks with torchrun, accelerate launch or `ranks`")
    return found


def share(count: int, part: int, parts: int) -> range:
    """The indices, of `count`, of part `part`: neighbors together, the first parts one longer where it is uneven.

    Neighbors often have one prompt and several seeds: a rank that has them all encodes it once.
    """
    least, more = divmod(count, parts)
    start = part * least + min(part, more)
    return range(start, start + least + (part < more))
