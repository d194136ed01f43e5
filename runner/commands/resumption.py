"""What a run's record says of its order, so that `resume` can go on with it: written here, and read back strictly."""

import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.commands.batch import Item, Refused
from runner.commands.order import DTYPES, STAGES, Order, Origin, default_store
from runner.events import Emit
from runner.media.image import commit
from runner.request import Request
from stages.errors import StoreError
from stages.families import FAMILIES
from stages.models.lora import LoraRequest

if TYPE_CHECKING:
    from runner.planning.plan import Plan

VERSION = 1
KEPT = ("stop_after", "overwrite", "no_metadata", "no_modulation_table", "no_p2p", "no_degrade", "lanes", "step_every",
        "preview", "sample_memory", "device", "gpus", "max_memory", "place", "allow_offload")
RESUME = "; go on with: "


def record_of(asked: Order, said: Any, job: "Plan") -> dict[str, Any]:
    """The order as JSON, under "order" and "requests": all that its pictures depend on, resolved."""
    model = asked.model
    return {
        "requests": [vars(request) for request in job.requests],
        "order": {
            "version": VERSION, "family": asked.family, "identity": job.checkpoint.identity,
            "model": None if model is None else absolute(model),
            "dtype": {name: str(place.dtype).removeprefix("torch.") for name, place in job.places.items()},
            "loras": [[absolute(lora.source), lora.scale, lora.digest] for lora in asked.loras],
            "items": [[item.line, item.id] for item in asked.items],
            "paths": [os.path.abspath(path) for path in asked.paths],
            "refused": [[line.line, line.text] for line in asked.refused],
            "options": {name: getattr(said, name) for name in KEPT},
        },
    }


def order_of(run: str, record: Mapping[str, Any], store: str) -> tuple[Order, dict[str, Any]]:
    """The order in a run's record, and its options by name; StoreError where there is none that can be read."""
    said = record.get("order")
    if not isinstance(said, dict):
        raise StoreError(f"run {run} was not started by the command line, so nothing says how to go on with it")
    version = said.get("version")
    if type(version) is not int or version != VERSION:
        raise StoreError(f"run {run} was recorded by a newer version (record {version!r}, this one reads {VERSION}) "
                         f"-> upgrade stagerun")
    try:
        return _order(run, record, said, store), _options(said["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the record of run {run} cannot be read ({type(error).__name__}: {error}) -> give its order "
                         f"again; its artifacts are kept") from None


def command(run: str, store: str) -> str:
    """What to type to go on with a run."""
    program = ["stagerun"] if Path(sys.argv[0]).name == "stagerun" else ["python", "-m", "runner"]
    return shlex.join([*program, "resume", run, *(() if store == str(default_store()) else ("--artifacts", store))])


@contextmanager
def resumable(run: str, store: str, emit: Emit) -> Iterator[Emit]:
    """The emit; an error that comes once the run is recorded leaves with a note that says how to go on."""
    recorded = False

    def heard(kind: str, data: Mapping[str, object]) -> None:
        nonlocal recorded
        recorded = recorded or kind == "stage"
        emit(kind, data)

    try:
        yield heard
    except BaseException as error:
        if recorded and lasts(store):
            error.add_note(RESUME + command(run, store))
        raise


def lasts(store: str) -> bool:
    """Whether a store is there when this process is not."""
    return store != "memory" and not store.startswith("memory:")


def resuming(error: BaseException) -> list[str]:
    """The words of the command that goes on after an error, behind the program's; none where there is none."""
    words = shlex.split(noted(error).removeprefix(RESUME))
    return words[words.index("resume") :] if words else []


def noted(error: BaseException) -> str:
    """How to go on after an error, where `resumable` noted it."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(RESUME)), "")


def _order(run: str, record: Mapping[str, Any], said: Mapping[str, Any], store: str) -> Order:
    requests = [Request(**each) for each in record["requests"]]
    family, identity = _text(said["family"], FAMILIES), _text(said["identity"])
    model = None if said["model"] is None else _near(_text(said["model"]))
    labels = [(_whole(line), None if name is None else _text(name)) for line, name in said["items"]]
    paths = [Path(_near(_text(path))) for path in said["paths"]]
    if not requests or len(labels) != len(requests) or len(paths) not in (0, len(requests)):
        raise ValueError(f"{len(requests)} requests, {len(labels)} labels, {len(paths)} paths")
    return Order(
        family=family,
        model=model,
        revision=commit(identity, model or FAMILIES[family].repo),
        items=tuple(Item(request, line, name) for request, (line, name) in zip(requests, labels, strict=True)),
        refused=tuple(Refused(_whole(line), _text(text)) for line, text in said["refused"]),
        run=run,
        paths=tuple(paths),
        dtype={_text(name): _text(dtype, DTYPES) for name, dtype in said["dtype"].items()},
        devices=(),
        store=store,
        origin=Origin(f"run {run}", identity, "bring that model back, or give the order anew"),
        resumed=True,
        loras=tuple(LoraRequest(_near(_text(source)), float(scale), _text(digest))
                    for source, scale, digest in said.get("loras", ())),
    )


def _options(said: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in said.items():
        listed = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if name not in KEPT or not (value is None or isinstance(value, bool | str) or listed):
            raise ValueError(f"the option {name}")
    if said["stop_after"] not in (None, *STAGES):
        raise ValueError("the stage that it stops after")
    return {name: said[name] for name in KEPT}


def _text(value: Any, known: Collection[str] | None = None) -> str:
    if not isinstance(value, str) or (known is not None and value not in known):
        raise ValueError(f"{str(value)[:60]!r} instead of a text" + (f" of {', '.join(known)}" if known else ""))
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:60]!r} instead of a count")
    return value


def absolute(name: str) -> str:
    """A model or a LoRA as processes in other folders understand it: the path of what is here, or its hub name."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _near(path: str) -> str:
    """An absolute path as it is said from here."""
    here = f"{os.getcwd()}{os.sep}"
    return path.removeprefix(here)
