"""What the ranks of a run tell each other, as JSON: the order, and what each of them did of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from runner.commands.batch import Item, Refused
from runner.commands.order import Order
from runner.request import Request
from stages.models.lora import LoraRequest


@dataclass(frozen=True)
class Task:
    """The whole order, and the options `said` that it came with; every rank does its share of it."""

    order: Order
    said: Any

    def document(self) -> dict[str, Any]:
        """The task as JSON; what it repeats, if anything, is for the first rank alone to check."""
        order = {field.name: getattr(self.order, field.name) for field in fields(Order)}
        order |= {"items": [{**vars(item), "request": vars(item.request)} for item in self.order.items],
                  "refused": [vars(line) for line in self.order.refused],
                  "paths": [str(path) for path in self.order.paths], "dtype": dict(self.order.dtype), "origin": None,
                  "loras": [vars(lora) for lora in self.order.loras]}
        return {"order": order, "said": {name: value for name, value in vars(self.said).items() if name != "ctx"}}


def read_task(document: Mapping[str, Any]) -> Task:
    """The task in a document."""
    order: dict[str, Any] = dict(document["order"])
    order |= {name: tuple(value) for name, value in order.items() if isinstance(value, list)}
    items = (Item(**{**item, "request": Request(**item["request"])}) for item in order["items"])
    order |= {"items": tuple(items), "refused": tuple(Refused(**line) for line in order["refused"]),
              "paths": tuple(map(Path, order["paths"])),
              "loras": tuple(LoraRequest(**lora) for lora in order["loras"])}
    return Task(Order(**order), read_options(document["said"]))


def read_options(said: Mapping[str, Any]) -> Any:
    """The options of a command line, from their names and values."""
    from runner.commands.cli import Options

    return Options(ctx=None, **said)  # type: ignore[arg-type]  # no command line is behind them
