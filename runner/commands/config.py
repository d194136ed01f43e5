"""`--print-config`: each setting of a run, and where it came from."""

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from runner.commands.options import FamilyOptions, ResumeOptions, RunOptions
from runner.commands.settings import SETTINGS, config_path
from runner.job import STEP_EVERY
from runner.job_defaults import default_store
from runner.media.paths import ONE
from runner.terminal import say, say_json
from runner.text import table
from stages.families import FAMILIES

_DEFAULTS = {
    "dtype": "bfloat16 where the card has it", "out": ONE, "step-every": f"{STEP_EVERY:g}", "preview": "none",
    "engine": "local", "ranks": "none", "rank-timeout": "120", "gpus": "all", "device": "all", "max-memory": "none",
    "place": "auto", "allow-offload": "none", "lanes": "as many as keep the cards busy",
}
_UNSAID = frozenset(("ctx", "family", "run", "words", "print_config", "json"))


def show_config(options: RunOptions, family: str, origins: Mapping[str, str]) -> None:
    """Print the value of each setting with its origin: the command line, a variable, the file, or a default."""
    rows = [(name, _text(value), origin) for name, value, origin in _settings(options, family, origins)]
    path = config_path()
    if options.json:
        say_json(sys.stdout, {
            "config": None if path is None else str(path), "exists": path is not None and path.exists(),
            "settings": {name: {"value": value, "origin": origin} for name, value, origin in rows}})
        return
    state = "" if path is None or path.exists() else " (there is none)"
    say(sys.stdout, [f"file: {'none' if path is None else path}{state}", *table(rows)])


def _settings(options: RunOptions, family: str, origins: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    asked = {each.name.replace("_", "-"): getattr(options, each.name) for each in fields(options)
             if each.name not in _UNSAID}
    found = []
    for name in (*SETTINGS, *(name for name in asked if name not in SETTINGS)):
        value = asked.get(name)
        if value not in (None, False, []):
            found.append((name, value, origins.get(name, "command line")))
        elif name in SETTINGS and name in asked:
            found.append((name, *_default(name, options, family)))
    return found


def _default(name: str, options: RunOptions, family: str) -> tuple[Any, str]:
    if name == "artifacts":
        return str(default_store()), "default"
    if isinstance(options, ResumeOptions):
        return "as it was", "the run"
    if isinstance(options, FamilyOptions) and options.like is not None and name in (
            "model", "dtype", "size", "steps", "guidance"):
        return "as it was", "the picture"
    chosen = FAMILIES["demo" if getattr(options, "model", None) == "demo" else family]
    own = {"model": chosen.repo, "size": "{}x{}".format(*chosen.size), "steps": str(chosen.steps),
           "guidance": "none" if chosen.guidance is None else f"{chosen.guidance:g}"}
    return (own[name], f"family {chosen.name}") if name in own else (_DEFAULTS[name], "default")


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "yes" if value is True else str(value)
