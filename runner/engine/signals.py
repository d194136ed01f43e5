"""Ctrl-C and signals: at a good moment, with what was done kept."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A run that somebody stopped: `run` is its name, `code` the exit code of the signal.

    It is a KeyboardInterrupt and no StagerunError: `except Exception` is not to swallow a Ctrl-C.
    """

    def __init__(self, number: int, run: str = "", by: str = "") -> None:
        super().__init__(f"stopped by {by or signal.Signals(number).name}")
        self.signal, self.run, self.code = signal.Signals(number), run, 128 + number


class StopRequest:
    """Whether a run should stop. A signal stops it at once, or `patiently`: after the current step.

    `wanted` is asked then, too. Listens inside of `with stop.listening():`, in the main thread; a second signal never
    waits.
    """

    def __init__(self, wanted: Callable[[], bool] | None = None) -> None:
        self.signal: int | None = None
        self._by = ""
        self._wanted = wanted
        self._patient = False

    @property
    def asked(self) -> bool:
        """Whether somebody asked, and it still waits for a good moment."""
        if self.signal is None and self._wanted is not None and self._wanted():
            self.signal, self._by = signal.SIGINT, "on_step"
        return self.signal is not None

    def ask(self) -> None:
        """Ask for a stop at a good moment."""
        self.signal = self.signal or signal.SIGINT

    def raise_if_asked(self) -> None:
        """Raise Interrupted if somebody asked."""
        if self.asked and self.signal is not None:
            raise Interrupted(self.signal, by=self._by)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """A block that looks at `asked` by itself, often enough."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        self.raise_if_asked()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals that would end the process; in another thread than the main one, none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # nohup and the like ignore a signal on purpose.
        known = {number: signal.getsignal(number) for number in SIGNALS}
        taken: dict[int, Any] = {number: handler for number, handler in known.items() if handler != signal.SIG_IGN}
        for number in taken:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        second = self.signal is not None
        self.signal = number
        if second or not self._patient:
            raise Interrupted(number)
