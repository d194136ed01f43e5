"""Which family, or which command, a word means: other spellings, hub ids, and models that are not supported."""

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from runner.commands.habits import command_for
from runner.machine_option import means_machine
from runner.reports.repeat import line
from runner.text import choices, shown
from stages.errors import InvalidInput
from stages.families import FAMILIES, is_unsupported, plain

_ALIASES = {
    "flux1": "flux", "flux-dev": "flux", "flux1-dev": "flux", "flux-krea": "flux", "flux1-schnell": "flux-schnell",
    "schnell": "flux-schnell", "flux2-dev": "flux2", "klein": "flux2-klein", "flux-klein": "flux2-klein",
    "flux2-klein-4b": "flux2-klein", "flux2-klein-base-4b": "flux2-klein-base", "klein-base": "flux2-klein-base",
    "qwen": "qwen-image", "qwenimage": "qwen-image", "sd35": "sd3", "sd35-large": "sd3", "sd3-large": "sd3",
    "stable-diffusion-3": "sd3", "stable-diffusion-35": "sd3", "stable-diffusion-35-large": "sd3",
    "zimage": "z-image", "z-image-turbo": "z-image", "zimage-turbo": "z-image",
}
# Which family the rest of a hub id is of, by what is in it; the first that fits.
_HINTS = (
    ("klein-base", "flux2-klein-base"), ("klein", "flux2-klein"), ("flux2", "flux2"), ("schnell", "flux-schnell"),
    ("flux", "flux"), ("qwen-image", "qwen-image"), ("stable-diffusion-3", "sd3"), ("sd3", "sd3"),
    ("z-image", "z-image"), ("zimage", "z-image"),
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def first_word(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """The words with the family in its own spelling in front; InvalidInput where they begin with nothing known."""
    if not words or words[0].startswith("-") or words[0] in commands:
        return list(words)
    word, rest = words[0], words[1:]
    if word.lower() in commands:
        return [word.lower(), *rest]
    if " " in word.strip():
        raise InvalidInput(f"{shown(word)} is no family and no command; to draw it -> "
                           f"{line('flux', word, *rest)}")
    if (family := named(word)) is None:
        raise InvalidInput(unknown(word, rest, commands))
    return [family, *rest]


def family_of(word: str, words: Sequence[str] = ()) -> str:
    """The family that a word means; InvalidInput where there is none, with the command of `words` that there is."""
    if word in FAMILIES:
        return word
    if (family := named(word)) is not None:
        return family
    if " " in word.strip():
        raise InvalidInput(f"{shown(word)} is no family -> name one before the prompt, such as flux")
    raise InvalidInput(unknown(word, (), FAMILIES, command=words[0] if words else ""))


def named(word: str) -> str | None:
    """The family that a word names in another spelling, or by the hub id of its model; None where it names none."""
    for family in FAMILIES.values():
        if word.lower() in (family.name, family.repo.lower()):
            return family.name
    # "flux.2" is flux2, and "FLUX.1-schnell" flux-schnell.
    return spelled if (spelled := plain(word)) in FAMILIES else _ALIASES.get(spelled)


def unknown(word: str, rest: Sequence[str], known: Collection[str], command: str = "") -> str:
    """What to say of a word that names no family: what it may be, and the command that would do."""
    if means_machine(word):
        return f"{shown(word)} is a machine and no family -> {line('plan', 'flux', '--machine', word)}"
    if word.endswith((".txt", ".jsonl")):
        return f"{shown(word)} is no family -> name one, and the file with --prompt-file {word}"
    last = plain(word.rpartition("/")[2])
    supported = f"supported are {', '.join(FAMILIES)}; python -m runner models tells more"
    if is_unsupported(word):
        return f"{shown(word)} is not supported -> {supported}"
    if _ID.fullmatch(word):
        if (family := next((name for hint, name in _HINTS if hint in last), None)) is not None:
            meant = line(*((command,) if command else ()), family, "--model", word, *rest)
            return f"{shown(word)} is the default model of no family -> {meant}"
        return (f"{shown(word)} is the default model of no family -> name the family that it is of, and the model "
                f"with --model {word}; {supported}")
    if command:
        return f"there is no family {shown(word)} -> {choices(word, FAMILIES)}"
    if (habit := command_for(word, rest)) is not None:
        return f"there is no command {shown(word)} -> {habit}"
    close = get_close_matches(word.lower(), known, 1)
    if not close:
        return f"there is no family and no command {shown(word)} -> python -m runner --help lists them"
    return f"there is no family and no command {shown(word)}. Did you mean {close[0]!r}?"
