"""What the record of a run tells: in short, in whole, and which run a word names. No torch."""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from runner.artifacts.manifest import checked_run, is_run
from runner.artifacts.signed_json import Damaged
from runner.artifacts.store import Store, StoredRun
from runner.artifacts.usage import Usage
from runner.text import clean, cut, gib, shown, table
from stages.errors import InvalidInput, StagerunError, StoreError
from stages.wording import counted, kind_of

SHOWN = 10
HEAD = ("run", "age", "status", "pictures", "alone", "shared")
# With less room than this beside the other columns a prompt has a line of its own.
LEAST = 24


@dataclass(frozen=True)
class RunSummary:
    """A run in a few words."""

    run: str
    """Its name."""
    begun: float
    """When it began by the clock of then, in seconds since 1970; 0 where that is not known."""
    status: str
    """Whether it is "running", "done", "interrupted" or "failed", or its record "damaged" or "unreadable"."""
    model: str
    """The model that it was asked of."""
    pictures: int
    """How many pictures it was asked for."""
    stages: Mapping[str, tuple[int, int]]
    """Finished artifacts and all, by stage."""
    prompt: str = ""
    """What its first picture shows."""
    alone: int | None = None
    """The bytes that it alone holds, its record among them; None where its record is damaged."""
    shared: int | None = None
    """The bytes that other runs hold as well; None where its record is damaged."""

    def document(self) -> dict[str, Any]:
        """The summary as JSON."""
        stages = {name: {"done": done, "of": of} for name, (done, of) in self.stages.items()}
        return {**vars(self), "stages": stages}

    def cells(self) -> tuple[str, ...]:
        """The summary as text, one cell per word of `HEAD`."""
        held = ("-" if size is None else gib(size) for size in (self.alone, self.shared))
        return self.run, age(self.begun), self.status, f"{self.pictures:,}", *held

    def measured(self, usage: Usage) -> "RunSummary":
        """The summary with the bytes that the run holds."""
        known = self.run in usage.held
        return replace(self, alone=usage.alone(self.run) if known else None,
                       shared=usage.shared(self.run) if known else None)

    def has(self, text: str) -> bool:
        """Whether its name, its model or its prompt has this text in it, whatever the case."""
        return any(text.casefold() in value.casefold() for value in (self.run, self.model, self.prompt))


def list_runs(rows: Sequence[RunSummary], width: int) -> list[str]:
    """The lines of `runs ls`, none wider than `width` columns where names allow: prompts behind the other columns, or
    below them where there is no room.
    """
    first, *others = table([HEAD, *(row.cells() for row in rows)])
    taken = max(map(len, [first, *others])) + 2
    prompts = [clean(row.prompt) for row in rows]
    if width - taken >= LEAST:
        told = (f"{line:{taken}}{cut(prompt, width - taken)}".rstrip()
                for line, prompt in zip(others, prompts, strict=True))
        return [f"{first:{taken}}prompt", *told]
    return [first, *(line for pair in zip(others, prompts, strict=True)
                     for line in (pair[0], f"  {cut(pair[1], width - 2)}") if line.strip())]


def find_run(store: Store, text: str) -> str:
    """The run that `text` names: by its name, by the start of it, or as `last`; StoreError where that is not one."""
    if not isinstance(text, str):
        raise InvalidInput(f"{kind_of(text)} is no name of a run -> \"last\", or one of "
                           f"open_store(...).runs()")
    if text == "last":
        runs = store.runs()
        if not runs:
            raise StoreError(f"there is no run in the store yet, so none is the last: {store.where} -> make a picture "
                             f"first, or name another `store`")
        return runs[-1]
    try:
        checked_run(text)
    except ValueError as error:
        raise StoreError(str(error)) from None
    names = [name for name in store.names("runs") if is_run(name)]
    found = [text] if text in names else [name for name in names if name.startswith(text)]
    if not found:
        raise StoreError(f"no run's name starts with {text}; the last are: {', '.join(store.runs()[-3:]) or 'none'}")
    if len(found) > 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise StoreError(f"the names of {len(found)} runs start with {text}: {some} -> give more of it")
    return found[0]


@contextmanager
def readable(run: str) -> Iterator[None]:
    """What is made of a run's record; StoreError where somebody changed it, and nothing can be made of it."""
    try:
        yield
    except StagerunError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StoreError(f"the record of run {run} cannot be read ({type(error).__name__}: {error}) -> its artifacts "
                         f"are kept; give its command again") from error


def summarize(store: Store, run: str, done: Collection[str], stored: StoredRun | None = None) -> RunSummary:
    """A run in a few words; `done` are the keys that are there."""
    try:
        found = stored or store.stored_run(run)
    except StoreError as error:
        return RunSummary(run, 0.0, "damaged" if isinstance(error.__cause__, Damaged) else "unreadable", "-", 0, {})
    record = found.record
    plan, requests = record.get("plan"), record.get("requests")
    model = plan.get("model") if isinstance(plan, dict) else None
    stages = {name: (sum(key in done for key in keys), len(keys)) for name, keys in stages_of(record).items()}
    requests = requests if isinstance(requests, list) else []
    first = requests[0] if requests else None
    prompt = first.get("prompt") if isinstance(first, dict) else None
    return RunSummary(run, found.begun, status(store, found), str(model or record.get("model", "-")), len(requests),
                      stages, prompt if isinstance(prompt, str) else "")


def status(store: Store, found: StoredRun) -> str:
    """How a run stands: running, done, interrupted or failed; one whose process was killed was interrupted."""
    status = clean(str(found.record.get("status", "unknown")))[:20]
    return "interrupted" if status == "running" and store.is_running(found.run) is False else status


def stages_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of a run, by stage."""
    stages = record.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    return {clean(str(name)): [str(key) for key in keys] for name, keys in stages.items() if isinstance(keys, list)}


def describe_run(facts: RunSummary, found: StoredRun, sizes: Mapping[str, int | None]) -> list[str]:
    """What `show` prints."""
    record = found.record
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.begun)) if facts.begun else "at an unknown time"
    lines = [f"{facts.run}: {facts.status}, begun {begun} ({age(facts.begun)} ago)", f"model {clean(facts.model)}"]
    if facts.alone is not None and facts.shared is not None:
        lines.append(f"holds {gib(facts.alone)} alone, {gib(facts.shared)} together with other runs")
    lines += [f"LoRA {_text(lora)}" for lora in loras(record)]
    for name, keys in stages_of(record).items():
        done, of = facts.stages[name]
        size = gib(sum(sizes[key] or 0 for key in dict.fromkeys(keys)))
        lines.append(f"{name} {done} of {of}, {size}: {_some([key[:12] for key in keys])}")
    requests = record.get("requests")
    for index, request in enumerate(requests[:SHOWN] if isinstance(requests, list) else ()):
        lines.append(f"request {index}: {_request(request)}")
    if facts.pictures > SHOWN:
        lines.append(f"... and {counted(facts.pictures - SHOWN, 'more request')}")
    for name in ("warnings", "changes", "failures"):
        values = record.get(name)
        for each in values[:SHOWN] if isinstance(values, list) else ():
            lines.append(f"{name.removesuffix('s')}: {_text(each)}")
    return lines + ([f"error: {_text(record['error'])}"] if "error" in record else [])


def loras(record: Mapping[str, Any]) -> list[str]:
    """The LoRAs of a run with their scales, as its plan says."""
    plan = record.get("plan")
    values = plan.get("loras", []) if isinstance(plan, dict) else []
    return [f"{lora['source']} x {lora['scale']}" for lora in values if isinstance(lora, dict)]


def age(begun: float) -> str:
    """The time since then, for people: `5 s`, `3 min`, `7 h`, `12 d`; - where a clock jumped."""
    past = time.time() - begun
    if not begun or past < 0:
        return "-"
    units = (("d", 86400), ("h", 3600), ("min", 60))
    unit, size = next((each for each in units if past >= each[1]), ("s", 1))
    return f"{past // size:.0f} {unit}"


def _request(request: object) -> str:
    if not isinstance(request, dict):
        return _text(request)
    size, others = f"{request.get('width')}x{request.get('height')}", ("steps", "guidance", "seed", "negative_prompt")
    there = {name.replace("_", " "): request[name] for name in others if request.get(name) is not None}
    values = ", ".join(f"{name} {_text(value)}" for name, value in there.items())
    return f"{shown(str(request.get('prompt')))}, {size}, {values}"


def _text(value: object) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value))[:300]


def _some(words: Sequence[str]) -> str:
    return " ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")
