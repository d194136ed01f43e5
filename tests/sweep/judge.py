"""What came of a case: pictures within the plan's figures, a refusal that helps, or a fault."""

import io
import json
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from runner.commands.cli import answer, app
from runner.commands.refusal import options_of
from runner.commands.words import again, line_words, spellings
from runner.request import Request
from stages.errors import Fix
from tests.sweep.case import Case, pair
from tests.sweep.models import Models

PROGRAM = "python -m runner "
NEXT = f"next: {PROGRAM}"
ARITHMETIC = re.compile(r"[0-9](\.[0-9]+)? ?([KMGT]i)?B\b|[0-9] bytes")
# What a refusal says of more memory, where no change of the command would help.
NEEDED = re.compile(r"it would fit with [0-9.]+ ([KMG]i)?B more on ")
# What it says where a command alone would not help, as lines of the prompt file have a size of their own.
KEPT = re.compile(r"that says a size keeps it: there, say ([0-9]+x[0-9]+) too")
# In place of all options that may stand in the way.
FREED = ("--max-memory", "--place", "--allow-offload", "--lanes")


@dataclass(frozen=True)
class Answer:
    """What a command line said."""

    code: int
    """The exit code; 70 where it raised."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""


@dataclass(frozen=True)
class Verdict:
    """How a case ended."""

    kind: str
    """In a word or two, to be counted."""
    fault: str = ""
    """What is wrong with that; empty where nothing is."""
    command: str = ""
    """The command line that was suggested, where there was one."""


def verdict(case: Case, models: Models) -> Verdict:
    """Run a case in the folder of its models, on cards of its own."""
    here = models.folder
    if case.lines:
        (here / case.file).write_text("".join(f"{json.dumps(line)}\n" for line in case.lines))
    set_up(case.cards)
    try:
        ended = _verdict(case, models)
        left = [torch.accelerator.memory_allocated(card) for card in range(len(case.cards))]
        return replace(ended, fault=f"{ended.fault}\nleft on the cards: {left}") if any(left) else ended
    finally:
        take_down()
        shutil.rmtree(here / "out", ignore_errors=True)
        shutil.rmtree(here / f"store-{case.seed}", ignore_errors=True)
        (here / case.file).unlink(missing_ok=True)


def set_up(cards: Sequence[int]) -> None:
    """Have cards of so many bytes, as if nothing had used them."""
    # Importing it makes simulated cards the accelerator of this process.
    from tests import sim

    sim.configure(cards)
    sim.reset()
    for index in range(len(cards)):
        torch.accelerator.reset_peak_memory_stats(index)
        torch.accelerator.reset_accumulated_memory_stats(index)


def take_down() -> None:
    """Have no cards; what was left on them counts on none."""
    from tests import sim

    sim.reset()
    sim.withdraw()


def said(words: Sequence[str]) -> Answer:
    """What the command line answers to these words, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = answer(words)
        except BaseException as error:  # whatever it is, it is the command's
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc(file=sys.stderr)
            code = 70
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return Answer(code, *texts)


def _verdict(case: Case, models: Models) -> Verdict:
    first = said(case.words)
    match first.code:
        case 130 | 143:
            # The run heard the signal first.
            raise KeyboardInterrupt
        case 0:
            return Verdict("made", "; ".join(wrongs(case, case.words, first, models)))
        case 2:
            lines = first.err.splitlines()
            fault = "" if case.wrong and len(lines) == 1 else f"exit code 2: {first.err}"
            return Verdict("contradiction", fault)
        case 4:
            return refused(case, first, models)
    return Verdict(f"exit code {first.code}", first.err[-2000:] or "no word")


def refused(case: Case, first: Answer, models: Models) -> Verdict:
    """Whether a refusal has its arithmetic, and either a suggestion that works or what would be needed."""
    commands = [line.removeprefix(NEXT) for line in first.err.splitlines() if line.startswith(NEXT)]
    if "ran out of memory" in first.err:
        return Verdict("exit code 4", first.err)
    if not commands:
        # A strategy that cannot be has no arithmetic, and always goes without it.
        told = " ".join(first.err.split())
        if (kept := KEPT.search(told)) and case.own:
            return _with_lines_of(kept[1], case, first, models)
        fault = "" if ARITHMETIC.search(told) and NEEDED.search(told) else "neither a way nor a need"
        if (better := overlooked(case.words)) is not None:
            fault = f"something fits: {better}"
        return Verdict("refused", fault and f"{fault}\n{first.err}")
    for command in commands:
        words = shlex.split(command)
        second = said(words)
        if second.code:
            return Verdict("suggested", f"the suggestion ends with {second.code}: {second.err[-2000:]}", command)
        if faults := [*wrongs(case, words, second, models)]:
            return Verdict("suggested", f"after the suggestion: {'; '.join(faults)}", command)
    return Verdict("suggested", "", commands[0])


def _with_lines_of(size: str, case: Case, first: Answer, models: Models) -> Verdict:
    """What comes of the fixes that a refusal has as data, with their size in the lines that have one too."""
    width, height = pair(size)
    changed = replace(
        case, lines=tuple({**line, "size": size} if "size" in line else line for line in case.lines),
        requests=tuple(replace(request, width=width, height=height) if request.index in case.own else request
                       for request in case.requests),
    )
    (models.folder / case.file).write_text("".join(f"{json.dumps(line)}\n" for line in changed.lines))
    fixes = tuple(Fix(**fix) for fix in json.loads(first.out.splitlines()[-1])["fixes"])
    words = line_words(again(case.words, options_of(fixes), spellings(app, case.words)))
    second = said(words)
    faults = [f"ends with {second.code}: {second.err[-2000:]}"] if second.code else [
        *wrongs(changed, words, second, models)]
    return Verdict("suggested with lines", "; ".join(faults), shlex.join(words))


def overlooked(words: Sequence[str]) -> str | None:
    """The first command line that fits where the options of `words` that are in the way are others, if any does."""
    kept, rest = list[str](), iter(words)
    for word in rest:
        if word in FREED:
            next(rest)
        elif not word.startswith(tuple(f"{name}=" for name in FREED)):
            kept.append(word)
    for more in ([], ["--allow-offload", "disk", "--lanes", "1"],
                 ["--allow-offload", "disk", "--lanes", "1", "--size", "16x16"]):
        if said(["plan", *kept, *more]).code == 0:
            return PROGRAM + shlex.join(["plan", *kept, *more])
    return None


def wrongs(case: Case, words: Sequence[str], done: Answer, models: Models) -> Iterator[str]:
    """All that is wrong with a run that ended well."""
    pictures, run = documents(done.out)
    planned = said(["plan", *words])
    if planned.code:
        yield f"what ran is not planned: {planned.err}"
        return
    plan = json.loads(planned.out)
    yield from over(plan, run)
    expected = {request.index: request for request in asked(case, words)}
    found = {picture["index"]: picture for picture in pictures}
    if found.keys() != expected.keys() or len(found) != len(pictures):
        yield f"pictures {sorted(found)} instead of {sorted(expected)}"
        return
    for index, request in expected.items():
        picture = found[index]
        if "changes" in picture:
            yield f"the run changed: {picture['changes']}"
        told = {name: picture.get(name) for name in ("prompt", "negative_prompt", "width", "height", "steps", "seed",
                                                      "guidance")}
        wanted = {name: getattr(request, name) for name in told}
        if told != wanted:
            yield f"picture {index} is of {told}, not {wanted}"
            return
        pixels = np.asarray(Image.open(Path(picture["path"])))
        if pixels.shape != (request.height, request.width, 3):
            yield f"picture {index} has the shape {pixels.shape}"
        else:
            tile = plan["tiles"][f"{request.width}x{request.height}"]
            if picture.get("tile") != tile:
                yield f"picture {index} says that its tiles are {picture.get('tile')}, {tile} planned"
            truth = models.truth(case.model, request, case.dtype, case.lora, tile)
            if not np.array_equal(pixels, truth):
                yield f"picture {index} differs by up to {int(np.abs(pixels.astype(int) - truth).max())}"


def documents(out: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pictures and the run of what --json printed: one object, or a line for each where there is a file."""
    lines = [json.loads(line) for line in out.splitlines()]
    if len(lines) == 1 and "kind" not in lines[0]:
        return lines[0]["pictures"], lines[0]
    pictures = [line for line in lines if line["kind"] == "picture"]
    return pictures, next(line for line in lines if line["kind"] == "run")


def over(plan: dict[str, Any], run: dict[str, Any]) -> Iterator[str]:
    """Where a card took more than was planned or allowed, or kept anything; for the host nobody counts."""
    for stage in run["stages"]:
        name = stage["stage"]
        if stage["left"]:
            yield f"{name} left {stage['left']:,} bytes"
        for device, peak in stage["peak"].items():
            if device == "cpu":
                continue
            need = plan["stages"][name].get(device, {"weights": 0, "activations": 0})
            most = need["weights"] + need["activations"]
            room = plan["devices"][device]["room"]
            if peak > most:
                yield f"{name} took {peak:,} bytes of {device}, {most:,} planned ({need})"
            if max(peak, most) > room:
                yield f"{name} took {peak:,} bytes of {device}, {most:,} planned, {room:,} allowed"
        held, limit = plan["host"]["stages"].get(name, {"held": 0})["held"], plan["limits"].get("cpu")
        if limit is not None and held > limit:
            yield f"{name} holds {held:,} bytes in host memory, {limit:,} allowed"


def asked(case: Case, words: Sequence[str]) -> list[Request]:
    """What a command line asks for: what the case does, at the size that these words say."""
    size = next(words[at + 1] for at in range(len(words) - 1, -1, -1) if words[at] == "--size")
    width, height = pair(size)
    return [request if request.index in case.own else replace(request, width=width, height=height)
            for request in case.requests]
