"""A prompt without its option: what was meant where it is several words, a command, or a file."""

import os
from collections.abc import Collection, Sequence

from runner.commands.options import FamilyOptions, PlanOptions, RunOptions
from runner.commands.words import Said, Spellings, read
from runner.reports.repeat import line
from runner.text import quoted, shown
from stages.errors import InvalidInput


def check_prompt_words(
    options: RunOptions, words: Sequence[str], known: Spellings, commands: Collection[str]
) -> None:
    """Raise InvalidInput for words that are no prompt as they stand, with the command that was meant."""
    if not isinstance(options, FamilyOptions) or not options.words:
        return
    first, *others = options.words
    lead = 2 if hasattr(options, "family") else 1
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


def _in_one(words: Sequence[str], prompt: Sequence[str], known: Spellings) -> list[str]:
    """The words with the parts of the prompt as one, where the first of them stands."""
    said = list(read(words, known))
    parts = [at for at, each in enumerate(said) if not each.option and each.value is not None][-len(prompt):]
    said[parts[0]] = Said((" ".join(prompt),))
    return [word for at, each in enumerate(said) if at not in parts[1:] for word in each.words]
