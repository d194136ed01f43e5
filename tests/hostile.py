"""JSON documents as somebody could have left them: one that is right, with some of its values odd, gone or added."""

import copy
from typing import Any

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e300, 1e-300, "", "0", "x", "-1", "../x",
    "/etc/passwd", "\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "<script>alert(1)</script>", "{{ 7 * 7 }}", "a\nb",
    "x" * 5000,
    [], [None], [[]], ["x"], [0] * 3, {}, {"x": 1}, {"": {}}, [[[[[[1]]]]]],
)


def places(document: Any) -> list[tuple[Any, ...]]:
    """The ways to every value of a document, as keys and numbers."""
    found: list[tuple[Any, ...]] = [()]
    inside = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) \
        else ()
    return found + [(key, *rest) for key, value in inside for rest in places(value)]


@st.composite
def mutated(draw: st.DrawFn, document: Any, odd: tuple[Any, ...] = ODD) -> Any:
    """The document with one to three changes: a value that is odd or gone, or a key that nobody knows."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        ways = places(changed)[1:]
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        inside = changed
        for key in way:
            inside = inside[key]
        match draw(st.sampled_from(("odd", "odd", "gone", "new"))):
            case "odd":
                inside[last] = copy.deepcopy(draw(st.sampled_from(odd)))
            case "gone":
                del inside[last]
            case _ if isinstance(inside, dict):
                inside[draw(st.sampled_from(("x", "", "__class__", "\x1b[2J")))] = draw(st.sampled_from(odd))
            case _:
                inside.append(draw(st.sampled_from(odd)))
    return changed
