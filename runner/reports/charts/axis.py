"""Numbers along an axis: round ones, with units, as many as there is room for."""

import math

from runner.text import gib


class Axis:
    """Maps 0 to `most` onto the pixels from `start` to `end`, which may run backwards."""

    def __init__(self, most: float, start: float, end: float) -> None:
        self.most, self.start, self.end = most or 1.0, start, end

    def at(self, value: float) -> float:
        """The pixel of a value; what lies outside is put on the edge."""
        part = min(1.0, max(0.0, value / self.most))
        return self.start + part * (self.end - self.start)

    def seconds(self, apart: float = 80) -> list[tuple[float, str]]:
        """Pixels and words of round numbers of seconds, at least `apart` pixels from each other."""
        step = _round(self._least(apart), (1, 2, 5, 10), 10)
        places = max(0, -math.floor(math.log10(step)))
        return [(self.at(value), f"{value:.{places}f} s") for value in self._steps(step)]

    def bytes(self, apart: float = 32) -> list[tuple[float, str]]:
        """Pixels and words of round numbers of bytes, at least `apart` pixels from each other."""
        unit = next((size for size in (2**30, 2**20, 2**10) if self.most >= size), 1)
        step = _round(self._least(apart) / unit, (1, 2, 5, 10), 10) * unit
        words = (gib(round(value)).replace(".0 ", " ") if value else "0" for value in self._steps(step))
        return list(zip(map(self.at, self._steps(step)), words, strict=True))

    def _least(self, apart: float) -> float:
        return self.most * min(1.0, apart / abs(self.end - self.start))

    def _steps(self, step: float) -> list[float]:
        return [number * step for number in range(math.floor(self.most / step * 1.0001) + 1)]


def _round(least: float, digits: tuple[int, ...], base: int) -> float:
    """The smallest of the digits times a power of the base that is no less than `least`."""
    power = float(base) ** math.floor(math.log(least, base))
    return next(digit * power for digit in digits if digit * power >= least * 0.9999)
