"""What a run's record says of its plan and its programs; what happened in it comes from the recorder."""

from typing import TYPE_CHECKING, Any

from runner import tables
from runner.layout import layout
from runner.picture import versions

if TYPE_CHECKING:
    from runner.plan import Plan


def described(plan: "Plan") -> dict[str, Any]:
    """The plan's figures, where each block lies, and the versions of what makes the pixels."""
    return {"plan": tables.document(plan), "layout": layout(plan), "versions": versions()}
