"""What is wrong with the words of a command line that do not go together, and which would."""

import re
from collections.abc import Sequence
from typing import Any

import typer

from runner.commands.habits import of_runs, option_for, otherwise
from runner.reports.repeat import line
from runner.text import choices, shown
from stages.families import FAMILIES

_CHOICES = re.compile(r"(?:Value error, )?'(.*)' is not one of (.*?)\.?")
_EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)")
_NO_COMMAND = re.compile(r"No such command '(.*?)'\..*|No such command '(.*)'.*")
_LEAST = re.compile(r"Input should be greater than or equal to ([0-9]+)")
# What stands for an argument that is missing, by its name.
_EXAMPLES = {"family": "flux", "run": "last", "artifact": "last:denoise"}


def usage(error: typer.TyperException, words: Sequence[str]) -> str:
    """What is wrong with the words of a command line, and what would do."""
    found = vars(error)
    context, param, message = found.get("ctx"), found.get("param"), str(found.get("message") or "")
    path = [] if context is None else _path(context)
    if "possibilities" in found:
        return _no_option(str(found["option_name"]), found["possibilities"] or (), context, path, words)
    if param is not None and not message and param.name in _EXAMPLES:
        rest = list(words)[len(path):]
        return f"{error.format_message().rstrip('.')} -> {line(*path, _EXAMPLES[param.name], *rest)}"
    if param is not None and (wrong := _CHOICES.fullmatch(message)) is not None:
        of = [each.strip("'") for each in wrong[2].split(", ")]
        return f"{param.opts[0]} {shown(wrong[1])} -> {choices(wrong[1], of)}"
    if param is not None and message.startswith("Input should be a valid integer"):
        return f"{param.opts[0]} must be a whole number"
    if param is not None and (least := _LEAST.fullmatch(message)) is not None:
        return f"{param.opts[0]} must be {least[1]} or more"
    if param is not None and param.name == "runs":
        return f"{error.format_message().rstrip('.')}: which there are -> {line('runs', 'ls')}"
    if (extra := _EXTRA.fullmatch(message)) is not None:
        return f"{' '.join(path)} takes no {shown(extra[1])}, but what is listed by -> {line(*path, '--help')}"
    if context is not None and hasattr(context.command, "commands"):
        return _no_command(message, [*context.command.commands], path)
    return error.format_message()


def _no_option(
    option: str, possible: Sequence[str], context: Any, path: Sequence[str], words: Sequence[str]
) -> str:
    """What to say of an option that the command does not have."""
    known = [] if context is None else [name for each in context.command.params for name in each.opts]
    if (meant := option_for(option, known)) is not None:
        return f"No such option: {option}. Did you mean {meant}?"
    if option == "--machine":
        return f"cards that need not be here are for plan, which loads nothing -> {line(*_planned(path, words))}"
    if path == ["report"] and option == "--json":
        return f"report writes a page; the record of a run as JSON -> {line('runs', 'show', *words[1:])}"
    if not path and option in {name for each in _family_options(context) for name in each.opts}:
        return f"{option} stands behind a family or a command -> {line('flux', *words)}"
    if (advice := otherwise(option)) is not None:
        return f"No such option: {option} -> {advice}"
    # The closest comes first; typer's own message sorts them by name.
    return f"No such option: {option}. Did you mean {possible[0]}?" if possible else f"No such option: {option}"


def _planned(path: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words that plan what the words ask for."""
    if path == ["batch"]:
        return ["plan", *words[1:]] if words[1:2] and words[1] in FAMILIES else ["plan", "flux", *words[1:]]
    return ["plan", *words] if path and path[0] in FAMILIES else ["plan", "flux", "--machine", "2xT4"]


def _no_command(message: str, known: Sequence[str], path: Sequence[str]) -> str:
    """What to say of a group whose command is missing, or is none of them."""
    missing = _NO_COMMAND.fullmatch(message)
    if missing is None:
        return f"{message.rstrip('.')} -> choose from {', '.join(known)}: {line(*path, known[0])}"
    word = missing[1] or missing[2]
    meant = of_runs(word) if path == ["runs"] else None
    hint = f"did you mean {meant}? choose from {', '.join(known)}" if meant else choices(word, known)
    return f"{' '.join(path)} has no command {shown(word)} -> {hint}"


def _path(context: Any) -> list[str]:
    """The words of the command, from the first behind the program on."""
    found: list[str] = []
    while context.parent is not None:
        found.insert(0, str(context.info_name))
        context = context.parent
    return found


def _family_options(context: Any) -> Sequence[Any]:
    command = None if context is None else getattr(context.command, "commands", {}).get("flux")
    return [] if command is None else list(command.params)
