"""A prompt without its option: what was meant where it is several words, a command, or a file."""

import os
import re
from collections.abc import Collection, Sequence

from runner.commands.options import FamilyOptions, PlanOptions, RunOptions
from runner.commands.words import Said, Spellings, read
from runner.machine_option import MachineOption, means_machine
from runner.reports.repeat import line
from runner.text import quoted, shown
from stages.errors import InvalidInput
from stages.families import FAMILIES

# A card that is known or not, so many times: nobody draws that.
_COUNTED = re.compile(r"[0-9]+ ?[x*] ?[A-Za-z]\S*")


def check_prompt_words(
    options: RunOptions, words: Sequence[str], known: Spellings, commands: Collection[str]
) -> None:
    """Raise InvalidInput for words that are no prompt as they stand, with the command that was meant."""
    if not isinstance(options, FamilyOptions) or not options.words:
        return
    first, *others = options.words
    if isinstance(options, PlanOptions) and means_machine(options.family):
        family = first if first in FAMILIES else "flux"
        raise InvalidInput(f"the family stands before the machine -> "
                           f"{line('plan', family, '--machine', options.family)}")
    lead = 2 if hasattr(options, "family") else 1
    for word in options.words:
        if isinstance(options, PlanOptions) and _COUNTED.fullmatch(word):
            MachineOption.read(word)
        if means_machine(word) and (len(options.words) < 3 or isinstance(options, PlanOptions)):
            planned = line(*_with_machine(options, words, word, known))
            raise InvalidInput(f"{shown(word)} is a machine -> {planned}; or to draw that word, "
                               f"--prompt {quoted(word)}")
    if first in commands and len(others) < 2 and not options.prompts:
        family = words[0] if lead == 1 else ""
        meant = (first, family) if first == "plan" and family else (first, *others)
        raise InvalidInput(f"{shown(first)} is a command, and stands in front -> {line(*meant)}; or to draw that "
                           f"word, --prompt {quoted(first)}")
    if others and not options.prompts:
        raise InvalidInput(f"a prompt of {len(options.words)} words stands in quotes -> "
                           f"{line(*_in_one(words, options.words, known))}")
    if first.endswith((".txt", ".jsonl")) and os.path.exists(first) and not isinstance(options, PlanOptions):
        raise InvalidInput(f"{shown(first)} is a file -> --prompt-file {quoted(first)} draws its lines; to draw that "
                           f"word, --prompt {quoted(first)}")


def _with_machine(options: FamilyOptions, words: Sequence[str], machine: str, known: Spellings) -> list[str]:
    """The words of the plan for a machine that stands among them without its option."""
    said = list(read(words, known))
    at = max(at for at, each in enumerate(said) if not each.option and each.value == machine)
    said[at] = Said(("--machine", machine))
    found = [word for each in said for word in each.words]
    return found if isinstance(options, PlanOptions) else ["plan", *found[found[0] == "batch":]]


def _in_one(words: Sequence[str], prompt: Sequence[str], known: Spellings) -> list[str]:
    """The words with the parts of the prompt as one, where the first of them stands."""
    said = list(read(words, known))
    parts = [at for at, each in enumerate(said) if not each.option and each.value is not None][-len(prompt):]
    said[parts[0]] = Said((" ".join(prompt),))
    return [word for at, each in enumerate(said) if at not in parts[1:] for word in each.words]
