"""`runner models`: the families, what their models are, and under which license."""

import sys
from typing import Any

from runner.terminal import say, say_json
from stages.families import FAMILIES, Family


def show_models(*, as_json: bool) -> None:
    """Print the families with their default models, or all of it as JSON."""
    if as_json:
        say_json(sys.stdout, {"families": [document(family) for family in FAMILIES.values()]})
        return
    said = [line for family in FAMILIES.values() for line in lines(family)]
    say(sys.stdout, [*said, "", "Any other checkpoint of a family: python -m runner FAMILY --model ID|FOLDER",
                     "Whether one fits: python -m runner plan FAMILY"])


def lines(family: Family) -> list[str]:
    """What a family is, in two lines."""
    size, guidance = "{}x{}".format(*family.size), "none" if family.guidance is None else f"{family.guidance:g}"
    gate = ", gated: accept it on its page first" if family.gated else ""
    return [f"{family.name}: {family.repo}, {_billions(family.parameters)} parameters",
            f"    {family.license}{gate}",
            f"    {size}, {family.steps} steps, guidance {guidance}"]


def document(family: Family) -> dict[str, Any]:
    """A family as JSON."""
    return {"family": family.name, "model": family.repo, "license": family.license, "gated": family.gated,
            "parameters": family.parameters, "width": family.size[0], "height": family.size[1],
            "steps": family.steps, "guidance": family.guidance, "negative_prompt": family.negative,
            "text_tokens": family.text_tokens}


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e8 else f"{count / 1e6:.1f} million"
