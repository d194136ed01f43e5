"""How a run tells what happens in it: one callable, which is handed a kind of event and its data."""

from collections.abc import Callable, Mapping

Emit = Callable[[str, Mapping[str, object]], None]


def silent(kind: str, data: Mapping[str, object]) -> None:
    """An `Emit` that tells nobody."""
