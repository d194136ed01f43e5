"""What can go wrong, as data: an error says what is wrong, with its arithmetic, and which changes would help.

    StagerunError
    +- InvalidInput       (ValueError)     what is asked for cannot be
    +- ModelError                          the model: missing, gated, damaged, foreign
    +- DoesNotFit                          it does not fit these devices
    |  +- NotPrecomputable                 no modulation table for this denoiser
    +- StageOutOfMemory   (MemoryError)    a device ran out of memory in a stage
    +- StoreError                          the artifact store
    +- BadResult                           a result that is no picture
    +- RankLost           (RuntimeError)   one process of several was lost

A message names what a job says in backquotes, as `size` or `allow_offload=cpu`. To Python that is a keyword argument,
and a command line says its option instead: see `worded`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.basis import Basis

_NUMBERS = frozenset(("count", "guidance", "guidance_scale", "lanes", "max_sequence_length", "num_images_per_prompt",
                      "num_inference_steps", "preview", "ranks", "seed", "step_every", "steps", "text_tokens", "tile"))
# What Python calls differently than a command line does, where no value is named.
_KEYWORDS = {"count": "requests", "out": "path", "size": "width and height"}
# Not part of a path or of what stands in quotes: that is a user's own.
Word = Callable[[str, str | None], str | None]
_REFERENCE = re.compile(r"(?<![\w'\"/.])`([a-z_]+)(?:=([^`]*))?`(?![\w'\"/]|\.\w)")
_OWN = "`\u2060"


@dataclass(frozen=True)
class Fix:
    """One change of a job that would help, together with the other fixes of the same error."""

    field: str
    """The name that the job has for it, such as `max_memory`."""
    value: str | int | float | bool | None = None
    """What it should be; None: not said at all."""
    component: str = ""
    """The stage or the component that is meant; empty for all of the job."""


Fixes = tuple[Fix, ...]


class StagerunError(Exception):
    """The root of all errors that a user can meet.

    `fixes` are changes of the job which together make it work, `alternatives` further such sets, the best first.
    """

    def __init__(self, text: str, fixes: Sequence[Fix] = (), alternatives: Sequence[Fixes] = ()) -> None:
        super().__init__(text)
        self.text, self.fixes, self.alternatives = text, tuple(fixes), tuple(alternatives)

    def __str__(self) -> str:
        return self.message(as_keyword)

    def message(self, word: Callable[[str, str | None], str | None]) -> str:
        """The message with what it names of the job in somebody's words, as `worded` has it.

        Files and stores that others made have a say in it: what would move a cursor is left out.
        """
        return "".join(c for c in worded(self.text, word) if c.isprintable() or c in "\n\u00a0")

    def to_json(self) -> dict[str, Any]:
        """The error as JSON, for another process; a subclass that is not of this module as what it is one of."""
        kind = next(kind for kind in type(self).__mro__ if kind in KINDS.values())
        return {"kind": kind.__name__, "text": self.text, "fixes": [asdict(fix) for fix in self.fixes],
                "alternatives": [[asdict(fix) for fix in fixes] for fixes in self.alternatives], **self.details()}

    def details(self) -> dict[str, Any]:
        """What else an error of this kind is made of, by the names of its constructor."""
        return {}


class InvalidInput(StagerunError, ValueError):
    """What is asked for cannot be, for any model or for this one."""


class ModelError(StagerunError):
    """A model that is not found, not readable, not complete, or not of the family asked for."""


class DoesNotFit(StagerunError):
    """A job that does not fit the devices; `basis` is what the plan of it rests on."""

    def __init__(
        self, text: str, fixes: Sequence[Fix] = (), alternatives: Sequence[Fixes] = (), assumed: Sequence[str] = (),
        shapes: str = "", unread: str = "",
    ) -> None:
        super().__init__(text, fixes, alternatives)
        self.basis = Basis(tuple(assumed), shapes, unread)

    def __str__(self) -> str:
        return "\n".join((super().__str__(), *self.basis.lines()))

    def details(self) -> dict[str, Any]:
        """What the plan rests on."""
        return asdict(self.basis)


class NotPrecomputable(DoesNotFit):
    """A denoiser whose modulation cannot be computed ahead; the run goes without the table."""


class StageOutOfMemory(StagerunError, MemoryError):
    """A device ran out of memory inside a stage; earlier artifacts are safe."""

    def __init__(
        self, text: str, fixes: Sequence[Fix] = (), alternatives: Sequence[Fixes] = (), stage: str = ""
    ) -> None:
        super().__init__(text, fixes, alternatives)
        self.stage = stage

    def details(self) -> dict[str, Any]:
        """The stage."""
        return {"stage": self.stage}


class StoreError(StagerunError):
    """An artifact store that cannot be read or written."""


class BadResult(StagerunError):
    """A non-finite, constant or wrongly sized result, stopped before it could become a picture."""


class RankLost(StagerunError, RuntimeError):
    """A rank that was killed, failed, left early or hangs; the run ends, and what was finished is kept."""

    def message(self, word: Callable[[str, str | None], str | None]) -> str:
        """The message, and that nothing is lost."""
        return f"{super().message(word)}; what was finished is kept, and the same once more goes on from there"


KINDS: Mapping[str, type[StagerunError]] = {
    kind.__name__: kind for kind in (StagerunError, InvalidInput, ModelError, DoesNotFit, NotPrecomputable,
                                     StageOutOfMemory, StoreError, BadResult, RankLost)
}


def from_json(document: Mapping[str, Any]) -> StagerunError:
    """The error that `StagerunError.to_json` described."""
    more = {name: value for name, value in document.items() if name not in ("kind", "text", "fixes", "alternatives")}
    return KINDS.get(document["kind"], StagerunError)(document["text"], [Fix(**fix) for fix in document["fixes"]],
                               [tuple(Fix(**fix) for fix in fixes) for fixes in document["alternatives"]], **more)


def worded(text: str, word: Word) -> str:
    """A message in somebody's words: `word` gives what stands for a name of the job and its value, if it has one.

    Where it gives None the reference stays as it is.
    """
    return _REFERENCE.sub(lambda found: word(found[1], found[2]) or found[0], text)


def as_own(text: str, words: Sequence[str]) -> str:
    """A message in which no name of the job is seen in what quotes these words of a user.

    What is put there for it is not printable, which `StagerunError.message` leaves out.
    """
    for word in words:
        for own in {word, word.partition("=")[2]}:
            if "`" in own:
                text = text.replace(own, own.replace("`", _OWN))
    return text


def as_keyword(name: str, value: str | None) -> str:
    """A name of the job as Python has it."""
    if value is None:
        return _KEYWORDS.get(name, name)
    if name == "size" and (sides := re.fullmatch("([0-9]+)x([0-9]+)", value)) is not None:
        return f"width={sides[1]}, height={sides[2]}"
    if name == "place" and "=" not in value:
        return f"what place says of {value}"
    if name in _NUMBERS:
        return f"{name}={value}"
    if value in ("True", "False", "None") or value.startswith('"'):
        return f"{name}={value}"
    return f"{name}={value!r}"
