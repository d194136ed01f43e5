"""The errors that a user can meet; each message carries its arithmetic and the next step.

    ValueError              a bad input                                  exit code 2
    +- ModelError            the model: missing, gated, damaged, foreign  exit code 3
    +- DoesNotFit            it does not fit these devices                exit code 4
    +- StoreError           the artifact store                           exit code 5
    +- BadResult            a result that is no picture                  exit code 6
    MemoryError
    +- StageOutOfMemory     a device ran out of memory                   exit code 4
"""

from collections.abc import Mapping


class ModelError(ValueError):
    """A model that is not found, not readable, not complete, or not of the family asked for."""


class DoesNotFit(ValueError):
    """A request that does not fit the devices.

    `options` are those of the command line that would make it fit, with their values; "" leaves an option out.
    """

    def __init__(self, text: str, options: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.options = dict(options or {})


class StoreError(ValueError):
    """An artifact store that cannot be read or written."""


class BadResult(ValueError):
    """A non-finite, constant or wrongly sized result, stopped before it could become a picture."""


class StageOutOfMemory(MemoryError):
    """A device ran out of memory inside a stage; earlier artifacts are safe.

    `ways` are sets of command line options with which the `stage` needs less, with their values.
    """

    def __init__(self, text: str, stage: str = "") -> None:
        super().__init__(text)
        self.stage = stage
        self.ways: tuple[Mapping[str, str], ...] = ()


class NotPrecomputable(DoesNotFit):
    """A denoiser whose modulation cannot be computed ahead; the run goes without the table."""
