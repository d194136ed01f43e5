"""What happens, told through one callable."""

from collections.abc import Callable, Mapping

Emit = Callable[[str, Mapping[str, object]], None]


def silent(kind: str, data: Mapping[str, object]) -> None:
    """An `Emit` for those who do not listen."""
