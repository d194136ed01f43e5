"""A run told to people: one live line on a terminal, with a rough preview under it; a few plain lines in a log."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from runner.terminal import TolerantStream
from runner.text import clean, gib, pictures, wrapped
from stages.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.segment import Segments

HEARTBEAT = 10.0
COLUMNS, ROWS = 32, 12
# The upper half of a letter's place in its own color, and the lower half in that of the background.
HALF = "\u2580"


class Status:
    """What the run is doing now, in one line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._requests, self._ranks = 0, Together()
        self._reset("starting")

    def _reset(self, doing: str) -> None:
        self._doing, self._since = doing, self._clock()
        self._first, self._last = self._since, self._since
        self._item, self._items = 0, 0
        self._step, self._steps = 0, 0
        self._done, self._skipped = 0, 0
        self._begun, self._planned = set[int](), 0

    def see(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take an event in."""
        if kind == "begin":
            self._now(str(data["what"]))
        elif kind == "run":
            self._requests = int(data["requests"])
        elif kind == "ranks":
            self._ranks.see(data, self._clock())
        elif kind == "stage":
            self._stage = str(data["stage"])
            self._reset("starting")
        elif kind == "load":
            where = f" on {data['device']}" if data.get("device") else ""
            self._now(f"loading {data['component']} ({gib(int(data['bytes']))}){where}")
        elif kind == "item":
            self._item, self._items, self._step = int(data["index"]) + 1, int(data["of"]), 0
            self._now(f"picture {self._item:,}/{self._items:,}")
            self._first = self._first if self._item > 1 else self._since
        elif kind == "resumed":
            self._skipped += int(data["step"])
        elif kind == "step":
            # With several pictures in flight, a step says which of them it belongs to.
            self._item = int(data.get("index", self._item - 1)) + 1
            self._step, self._steps, self._done = int(data["step"]), int(data["steps"]), self._done + 1
            if self._item not in self._begun:
                self._planned += self._steps
                self._begun.add(self._item)
            self._now(f"picture {self._item:,}/{self._items:,}, step {self._step}/{self._steps}")
            self._last = self._since
        elif kind == "flush":
            self._now(f"freed {gib(int(data['freed']))}")
            self._done = self._item = 0

    def line(self) -> str:
        """Such as `denoise: picture 1/2, step 3/28, 1.20 s/step, 0:53 left`, or of several ranks what all of them did.
        """
        if self._ranks.stage:
            doing = f"{self._doing}, " if self._stage == self._ranks.stage else ""
            return self._ranks.line(self._requests) or (
                f"{self._ranks.stage}: 0 % of {pictures(self._requests)} on {self._ranks.count} ranks, {doing}"
                f"{self._clock() - self._since:.0f} s")
        return f"{self._stage}{': ' if self._stage else ''}{self._doing}, {self._pulse()}"

    def _pulse(self) -> str:
        if self._done:
            # Pictures of one run may differ in steps: those that are not begun count as the others on average.
            steps = self._items * self._planned / len(self._begun)
            pace = (self._last - self._first) / self._done
            return f"{rate(pace, 'step')}, {minutes(max(0.0, steps - self._skipped - self._done) * pace)} left"
        if self._item > 1:
            pace = (self._since - self._first) / (self._item - 1)
            waited = self._clock() - self._since
            return (f"{rate(pace, 'picture')}, "
                    f"{minutes(max(0.0, (self._items - self._item + 1) * pace - waited))} left")
        return f"{self._clock() - self._since:.0f} s"

    def _now(self, doing: str) -> None:
        self._doing, self._since = doing, self._clock()


class Together:
    """How far several ranks are with a stage, from what the event `ranks` tells."""

    def __init__(self) -> None:
        self.count, self.stage = 1, ""
        self._first, self._last = (0.0, 0.0), (0.0, 0.0)

    def see(self, data: Mapping[str, Any], now: float) -> None:
        """Take in that so many pictures are through a stage, now."""
        if data["stage"] != self.stage:
            self.stage, self._first = str(data["stage"]), (now, float(data["done"]))
        self.count, self._last = int(data["ranks"]), (now, float(data["done"]))

    def line(self, requests: int) -> str:
        """Such as `denoise: 41 % of 8 pictures on 2 ranks, 1.20 s/picture, 0:53 left`; empty before there is any."""
        (begun, before), (now, done) = self._first, self._last
        if not done:
            return ""
        pace = (now - begun) / (done - before) if done > before else 0.0
        # Down: what is nearly there is not there.
        told = f"{self.stage}: {int(100 * done / requests)} % of {pictures(requests)} on {self.count} ranks"
        return f"{told}, {rate(pace, 'picture')}, {minutes((requests - done) * pace)} left" if pace else told


def rate(pace: float, what: str) -> str:
    """Seconds for one as `1.20 s/step`, or where that is short as `25.0 steps/s`."""
    return f"{1 / pace:.1f} {what}s/s" if 0 < pace < 0.1 else f"{pace:.2f} s/{what}"


def minutes(seconds: float) -> str:
    """Seconds as `0:53` or `1:02:03`."""
    whole, rest = divmod(round(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02d}:{rest:02d}" if hours else f"{whole}:{rest:02d}"


class Progress:
    """An emit that tells people how a run goes, with a live line inside of `with progress: ...`.

    `verbosity` is -1 for silence, 0, or 1 for every event; `heartbeat` is the longest silence, in seconds, while
    nobody watches a terminal.
    """

    def __init__(self, stream: TextIO, *, verbosity: int = 0, heartbeat: float = HEARTBEAT) -> None:
        self._stream = TolerantStream(stream)
        self._verbosity = verbosity
        self._heartbeat = heartbeat
        self._status = Status()
        self._summary = Summary()
        self._told = time.monotonic()
        self._over = threading.Event()
        self._live: Live | None = None
        self._preview: Any = None

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        self._status.see(kind, data)
        self._summary.see(kind, data)
        if kind in ("preview", "end"):
            self._preview = data["pixels"]() if kind == "preview" else None
        if self._verbosity < 0:
            return
        lines = [*self._summary.lines(kind, data)]
        if self._verbosity > 0:
            lines += verbose(kind, data, self._status.line)
        for line in lines:
            # What somebody may look for, or paste, stays on one line.
            whole = line.startswith(("warning: ", "failed: "))
            for part in [line] if whole else wrapped(clean(line), self._stream.columns):
                self._say(part)

    def __enter__(self) -> "Progress":
        if self._verbosity >= 0 and self._stream.isatty():
            self._live = _live(self._stream, self._status.line, lambda: self._preview)
            self._live.start()
        elif self._verbosity >= 0:
            self._over.clear()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, line: str) -> None:
        self._told = time.monotonic()
        if self._live is not None:
            self._live.console.print(_kept(line), markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(_kept(line) + "\n")
            self._stream.flush()

    def _beat(self) -> None:
        while not self._over.wait(self._heartbeat / 10):
            if time.monotonic() - self._told >= self._heartbeat:
                self._say(self._status.line())


def _kept(line: str) -> str:
    """A line with what is in front of it, without what moves a cursor or turns the reading direction."""
    return f"{line[: len(line) - len(line.lstrip(' '))]}{clean(line)}"


class Summary:
    """The line that a stage leaves when it is over, and what must be said at once."""

    def __init__(self) -> None:
        self._asked = 0
        self._reused = 0
        self._whose = ""
        self._freed: Mapping[str, Any] = {}

    def see(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take an event in."""
        if kind == "stage":
            self._asked, self._reused, self._freed = int(data["requests"]), int(data["reused"]), {}
        elif kind == "flush":
            self._freed = data
        elif kind == "ranks":
            # What a stage leaves is of the first rank alone; the end of the run tells of all.
            self._whose = f"rank 0 of {data['ranks']}, "

    def lines(self, kind: str, data: Mapping[str, Any]) -> Iterator[str]:
        """What everyone should read of this event."""
        if kind == "plan":
            yield str(data["text"])
        elif kind == "run":
            count, seed = int(data["requests"]), int(data["seed"])
            yield f"run {data['run']}: {pictures(count)}, {data['model']}, {'first ' if count > 1 else ''}seed {seed}"
        elif kind == "warning":
            yield f"warning: {data['text']}"
        elif kind == "failure":
            line = f"line {data['line']}: " if "line" in data else ""
            yield f"failed: {line}{data['text']}"
        elif kind == "end":
            yield self._over(data)
            yield from self._left(str(data["stage"]))

    def _over(self, data: Mapping[str, Any]) -> str:
        ran = self._asked - self._reused
        parts = [f"{pictures(ran)} in {sum(data['seconds'].values()):.1f} s"] if ran else []
        parts += [f"{pictures(self._reused)} taken from the store"] if self._reused else []
        parts += [f"peak {device} {gib(int(peak))}" for device, peak in data.get("peak", {}).items()] if ran else []
        parts += [f"freed {gib(int(self._freed['freed']))}"] if self._freed.get("freed") else []
        return f"{self._whose}{data['stage']}: {', '.join(parts)}"

    def _left(self, stage: str) -> Iterator[str]:
        if int(self._freed.get("left", 0)) > 0:
            found = [f"{x['kind']} {tuple(x['shape'])} {gib(int(x['bytes']))}" for x in self._freed["leftovers"]]
            yield f"warning: {stage} left {gib(int(self._freed['left']))} behind: {'; '.join(found)}"


def verbose(kind: str, data: Mapping[str, Any], line: Callable[[], str]) -> Iterator[str]:
    """What only those read who asked for everything."""
    if kind in ("load", "item", "step", "flush"):
        yield line()
    elif kind == "loaded":
        yield f"{data['stage']}: loaded in {float(data['seconds']):.1f} s"
    elif kind == "table":
        yield (f"{data['stage']}: {counted(int(data['layers']), 'layer')} computed ahead in "
               f"{float(data['seconds']):.1f} s, {gib(int(data['bytes']))}")


def _live(stream: TolerantStream, line: Callable[[], str], preview: Callable[[], Any]) -> "Live":
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream, force_terminal=True)  # type: ignore[arg-type]  # a stream in all that rich asks of it

    def shown() -> RenderableType:
        text, pixels = Text(line(), no_wrap=True, overflow="ellipsis"), preview()
        return text if pixels is None or not can_show(console) else Group(text, mosaic(pixels))

    return Live(
        get_renderable=shown, console=console, transient=True, refresh_per_second=4, redirect_stdout=False,
    )


def can_show(console: "Console") -> bool:
    """Whether a terminal has the letter, colors enough, and room for the picture and some lines."""
    has_letter = HALF.encode(console.encoding, "ignore").decode(console.encoding) == HALF
    return has_letter and console.color_system in ("truecolor", "256") and console.height > ROWS + 8


def mosaic(pixels: Any) -> "Segments":
    """Pixels, uint8 [height, width, 3], as at most 32 columns and 12 lines of letters."""
    from PIL import Image
    from rich.color import Color
    from rich.segment import Segment, Segments
    from rich.style import Style

    picture = Image.fromarray(pixels)
    scale = min(COLUMNS / picture.width, 2 * ROWS / picture.height)
    width, lines = max(1, round(picture.width * scale)), max(1, round(picture.height * scale / 2))
    colors = picture.resize((width, 2 * lines), Image.Resampling.BOX).load()
    assert colors is not None
    found = []
    for line in range(lines):
        for column in range(width):
            upper, lower = (Color.from_rgb(*colors[column, 2 * line + half]) for half in (0, 1))  # type: ignore[misc]
            found.append(Segment(HALF, Style(color=upper, bgcolor=lower)))
        found.append(Segment.line())
    return Segments(found)
