"""Families that take less than another: what is named where a model is too slow or too large for a machine."""

import math
from functools import cache

from stages.families import FAMILIES
from stages.models.shapes import shipped

LESS = 0.5


def quicker(family: str) -> list[str]:
    """The families whose denoise computes at most half as much for a picture, the least first, with their steps."""
    own = _parameters(family) * _calls(family)
    found = {name: _parameters(name) * _calls(name) for name in FAMILIES}
    return [f"{name} ({FAMILIES[name].steps} steps)" for name in _least(found, own)]


def smaller(family: str) -> list[str]:
    """The families whose denoiser has at most half as many parameters, the least first."""
    return _least({name: _parameters(name) for name in FAMILIES}, _parameters(family))


def _least(found: dict[str, int], own: int) -> list[str]:
    return sorted((name for name, count in found.items() if 0 < count <= LESS * own), key=lambda name: found[name])


def _calls(family: str) -> int:
    """The calls of the denoiser for a picture, as the family is run: guidance with a negative prompt takes two."""
    defaults = FAMILIES[family]
    twice = defaults.negative or family == "flux2-klein-base"
    return defaults.steps * (2 if twice else 1)


@cache
def _parameters(family: str) -> int:
    """Parameters of a family's denoiser; 0 where no shapes of it ship."""
    shapes = shipped(FAMILIES[family].repo)
    if shapes is None:
        return 0
    return sum(math.prod(shape) for path, tensors in shapes.weights.items() if path.startswith("transformer/")
               for _, shape in tensors.values())
