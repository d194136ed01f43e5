"""`runner models`: the families, what their models are, and under which license."""

import sys
from typing import Any

from runner.terminal import say, say_json
from stages.families import FAMILIES, Family


def show_models(name: str | None = None, *, as_json: bool) -> None:
    """Print the families, or the one of this name, with their default models, or all of it as JSON."""
    shown = [family for family in FAMILIES.values() if name in (None, family.name)]
    if as_json:
        say_json(sys.stdout, {"families": [document(family) for family in shown]})
        return
    said = [line for family in shown for line in lines(family)]
    which = name or "FAMILY"
    say(sys.stdout, [*said, "", f"Any other checkpoint of {'it' if name else 'a family'}: python -m runner {which} "
                                f"--model ID|FOLDER",
                     f"Whether {'it' if name else 'one'} fits: python -m runner plan {which}"])


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
