"""What a plan rests on that nobody looked at: it is said with a plan, and with why there is none."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Basis:
    """What was not said of a machine, or could not be read of a model, and what is taken for it."""

    assumed: tuple[str, ...] = ()
    """What is taken for what nobody said of the machine."""
    shapes: str = ""
    """What the shapes were made from that stand in for a model's files; empty where those were read."""
    unread: str = ""
    """Why those files were not read."""

    def lines(self) -> Iterator[str]:
        """The same for people."""
        if self.shapes:
            yield f"planned from shapes that ship with stagerun, {self.shapes}"
            yield f"its own files are planned from once they can be read: {self.unread}"
        yield from (f"assumed: {text}" for text in self.assumed)
