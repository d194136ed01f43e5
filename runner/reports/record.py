"""What a run's record says of its plan and its programs; what happened in it comes from the recorder."""

from typing import TYPE_CHECKING, Any

from runner.media.image import versions
from runner.planning import describe
from runner.planning.layout import layout

if TYPE_CHECKING:
    from runner.planning.plan import Plan


def described(plan: "Plan") -> dict[str, Any]:
    """The plan's figures, where each block lies, and the versions of what makes the pixels."""
    return {"plan": describe.document(plan), "layout": layout(plan), "versions": versions()}
