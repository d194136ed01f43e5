"""A machine that need not be here, as the command line spells it: cards by name or memory, and what is beside them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runner.placement_options import read_bytes
from runner.text import gib, shown
from stages.cards import Card, find_card, near_names, variants
from stages.errors import InvalidInput

CARDS = 64
FORMS = "write cards such as 2xT4, 1x3090+1x4060, 2x16GB or 16GB+8GB"
MORE = "ram=30GB, disk=100GB, no-bf16"
_APART = re.compile(r"\s*([+&,;]|\band\b)\s*", re.IGNORECASE)
# Whoever writes 2*T4, 2 T4, 2T4 or H100:8 means so many cards, too.
_TIMES = r"\s*[x*\u00d7]\s*"
_COUNT_FIRST = re.compile(rf"([0-9]{{1,2}})(?:{_TIMES}|\s+|(?=[a-z]))(\S.*)", re.IGNORECASE)
_COUNT_LAST = re.compile(rf"(\S.*?)(?:{_TIMES}|\s*:\s*)([0-9]{{1,2}})", re.IGNORECASE)
_FAR_TOO_MANY = re.compile(rf"([0-9]{{3,9}}){_TIMES}(\S.*)", re.IGNORECASE)
_SIZE = re.compile(r"[0-9.]+\s*([kmgt]i?b?)?", re.IGNORECASE)
# The memory behind a name, without its unit: A100-80.
_BARE_MEMORY = re.compile(r"(.*\S)[\s-]+([0-9]{1,3})")
_UNITLESS = re.compile(r"(.*[0-9]\s*)([kmgt]i?)", re.IGNORECASE)


@dataclass(frozen=True)
class CardOption:
    """One card of the machine."""

    size: int
    """Bytes of its memory."""
    bfloat16: bool
    """Whether it computes in bfloat16 by itself."""
    card: Card | None = None
    """The kind of card, where it is named."""

    @property
    def label(self) -> str:
        """What it is called."""
        return self.card.full_name if self.card else "hypothetical"


@dataclass(frozen=True)
class MachineOption:
    """The machine that a text spells."""

    cards: tuple[CardOption, ...]
    """Its cards in the order of use; none where the host computes."""
    ram: int | None = None
    """Bytes of host memory; None where nobody said."""
    disk: int | None = None
    """Bytes that are free on its disk; None where nobody said."""
    assumed: tuple[str, ...] = ()
    """What was not said, and what is taken for it."""

    @classmethod
    def read(cls, text: str) -> "MachineOption":
        """The machine that `2xT4`, `1x3090+1x4060` or `2x16GB,ram=30GB,disk=100GB,no-bf16` spells.

        Raises InvalidInput for another text.
        """
        # Names and what stands between them, in turn.
        first, *rest = _APART.split(text.strip())
        parts = [("+", first), *zip(rest[::2], rest[1::2], strict=True)]
        said = _Said(text, [part for _, part in parts if _is_said(part)])
        named = [(sign, part) for sign, part in parts if not _is_said(part)]
        if [part.lower() for _, part in named] == ["cpu"]:
            if said.ram is None:
                raise InvalidInput(f"`machine` {shown(text)}: a machine without cards computes in host memory, and "
                                   f"nobody says how much there is -> cpu,ram=32GB")
            return cls((), said.ram, said.disk, said.assumed(()))
        if not named:
            raise InvalidInput(f"`machine` {shown(text)} names no card: {FORMS}; or, to compute on the CPU, "
                               f"cpu,ram=32GB")
        for sign, part in named:
            if sign in ",;" and find_card(part) is None and _SIZE.fullmatch(part):
                raise InvalidInput(f"`machine` {shown(text)}: {shown(part)} may be of a card or of the host -> "
                                   f"cards are joined by +, as 2xT4+{part}; ram={part} is host memory")
        kinds = [_kind(part, text, said.bfloat16) for _, part in named]
        if sum(count for count, _ in kinds) > CARDS:
            raise InvalidInput(f"`machine` {shown(text)} has {sum(count for count, _ in kinds):,} cards; the limit is "
                               f"{CARDS}")
        cards = tuple(card for count, card in kinds for _ in range(count))
        return cls(cards, said.ram, said.disk, said.assumed(cards))


def means_machine(text: str) -> bool:
    """Whether a word names the cards of a machine, by a card's name or by memory with its unit."""
    try:
        found = MachineOption.read(text)
    except InvalidInput:
        return False
    return any(card.card for card in found.cards) or re.search("[0-9] ?gi?b?\\b", text, re.IGNORECASE) is not None


class _Said:
    """What is said of a machine besides its cards."""

    def __init__(self, text: str, parts: Sequence[str]) -> None:
        self.ram: int | None = None
        self.disk: int | None = None
        self.bfloat16: bool | None = None
        seen = set[str]()
        for part in parts:
            name, sign, value = (piece.strip() for piece in part.lower().partition("="))
            about = {"no-bf16": "bf16", "no-bfloat16": "bf16", "bfloat16": "bf16"}.get(name, name)
            if about in seen:
                raise InvalidInput(f"`machine` {shown(text)} says {about} twice -> say it once")
            seen.add(about)
            if name in ("ram", "disk") and sign:
                setattr(self, name, _bytes(value, text))
            elif about == "bf16" and not sign:
                self.bfloat16 = not name.startswith("no-")
            else:
                raise InvalidInput(f"`machine` {shown(text)}: {shown(part)} is nothing that is said of a machine: "
                                   f"write {MORE}; cards are joined by +")

    def assumed(self, cards: Sequence[CardOption]) -> tuple[str, ...]:
        """What is taken for what nobody said."""
        found = [_assumed(card, self.bfloat16) for card in dict.fromkeys(cards)]
        if self.ram is None:
            found.append("host memory: not said, so not counted (ram=32GB says it)")
        if self.disk is None:
            found.append("disk: not said, so not counted (disk=100GB says it)")
        return tuple(filter(None, found))


def _assumed(card: CardOption, said: bool | None) -> str:
    if card.card is None:
        return "" if said is not None else f"cards of {gib(card.size)} have bfloat16 (no-bf16 says that they do not)"
    kind = card.card
    half = "bfloat16" if kind.bfloat16 else "no bfloat16 of its own"
    text = f"{kind.full_name}: {gib(kind.memory)} as torch sees it, {half}, {kind.link / 1e9:.0f} GB/s from the host"
    if kind.nvlink:
        text += f", {kind.nvlink / 1e9:.0f} GB/s over NVLink"
    others = [other.full_name for other in variants(kind.name) if other is not kind]
    known = f"; {' and '.join(others)} would be another" if others else ""
    return text + known + (f"; taken {'with' if said else 'without'} bfloat16, as was said"
                           if said not in (None, kind.bfloat16) else "")


def _is_said(part: str) -> bool:
    """Whether a part of the text is no card, but what is said besides."""
    return "=" in part or part.lower().endswith(("bf16", "bfloat16")) or part.lower() in ("ram", "disk")


def _counted(part: str) -> tuple[int, str]:
    """How many cards a part of the text means, and what they are called."""
    # The name of a card, or its memory, may look like a count with what is counted.
    if find_card(part) is None and not _SIZE.fullmatch(part):
        if first := _COUNT_FIRST.fullmatch(part):
            return int(first[1]), first[2]
        if last := _COUNT_LAST.fullmatch(part):
            return int(last[2]), last[1]
        if (many := _FAR_TOO_MANY.fullmatch(part)) and not many[2].isdecimal():
            return int(many[1]), many[2]
    return 1, part


def _kind(part: str, text: str, bfloat16: bool | None) -> tuple[int, CardOption]:
    """How many cards a part of the text means, and which."""
    count, name = _counted(part)
    name = name.replace("(", " ").replace(")", " ").strip()
    if not name or not count:
        raise InvalidInput(f"`machine` {shown(text)} is no machine: {FORMS}")
    card = find_card(name)
    if card is None and (bare := _BARE_MEMORY.fullmatch(name)) is not None:
        card = find_card(f"{bare[1]}-{bare[2]}GB")
    if card is not None:
        return count, CardOption(card.memory, card.bfloat16 if bfloat16 is None else bfloat16, card)
    # A number of four digits is meant for the name of a card.
    if _SIZE.fullmatch(name) and not re.fullmatch("[0-9]{4,}", name):
        return count, CardOption(_bytes(name, text), True if bfloat16 is None else bfloat16)
    if others := variants(name):
        raise InvalidInput(f"`machine` {shown(text)}: there is no {shown(name)} -> "
                           f"{' or '.join(other.full_name for other in others)}")
    near = near_names(name)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InvalidInput(f"`machine` {shown(text)}: {shown(name)} is no card that is known here -> {hint}{FORMS}: any "
                       f"card can be written by its memory")


def _bytes(amount: str, text: str) -> int:
    # 16G is 16GB here: no other unit could be meant.
    whole = f"{amount}B" if _UNITLESS.fullmatch(amount) else amount
    try:
        return read_bytes(whole)
    except InvalidInput:
        raise InvalidInput(f"`machine` {shown(text)}: {shown(amount)} is no amount of memory: write 16GB or 15GiB; "
                           f"{FORMS}") from None
