"""A command line by chance, on simulated cards of random sizes around what its model needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from runner.request import Request, requests_for
from stages.families import FAMILIES
from tests.sweep.models import KINDS, SCALE, Facts, Kind, Models

PROMPTS = ("a red circle", "two small green squares on a blue background", "fox \u732b",
           "a photo of a dog with a cat-like look, " * 2)
SIZES = ("64x48", "48x64", "64x64", "32x32", "16x96", "128x64")
TILES = ("64", "64", "128", "0", "auto")
GUIDANCE = (0.0, 1.0, 1.5, 4.0, 30.0)
NEGATIVE = ("blurry", "a blue square, " * 3)
LEAST = 2**18
STRATEGIES = ("resident", "spread", "sharded", "streamed", "auto")


@dataclass(frozen=True)
class Case:
    """One command line, and what it asks for."""

    seed: int
    """Its number, which it is made of."""
    model: str
    """The name of its model among `KINDS`."""
    cards: tuple[int, ...]
    """Bytes of each simulated card."""
    words: tuple[str, ...]
    """The words behind `python -m runner`."""
    requests: tuple[Request, ...]
    """What must come of it."""
    own: frozenset[int] = frozenset()
    """The indices of requests whose line says a size of its own."""
    lines: tuple[Mapping[str, Any], ...] = ()
    """The lines of the prompt file; none where there is no file."""
    dtype: str = "float32"
    """The type of all components."""
    lora: bool = False
    """Whether there is a LoRA."""
    wrong: str = ""
    """What of the options cannot be, unless a later one replaces it; empty where all can."""

    @property
    def file(self) -> str:
        """The name of the prompt file."""
        return f"{self.seed}.jsonl"

    def __str__(self) -> str:
        lines = f"; {self.file}: {' '.join(map(json.dumps, self.lines))}" if self.lines else ""
        return f"cards of {', '.join(f'{size:,}' for size in self.cards)} bytes{lines}"


@dataclass
class Draft:
    """A case that is being made."""

    random: Random
    """Where chance comes from."""
    facts: Facts
    """What the model needs."""
    cards: Sequence[int]
    """Bytes of each card."""
    used: Sequence[int]
    """The numbers of the cards that are used, none where it is the host."""
    words: list[str] = field(default_factory=list)
    """Options so far."""

    def sometimes(self, part: float) -> bool:
        """True in this part of all cases."""
        return self.random.random() < part

    def amount(self, size: float) -> str:
        """Around so many bytes, as --max-memory takes them."""
        unit, each = self.random.choice((("B", 1), ("KiB", 2**10), ("MB", 10**6), ("KB", 10**3)))
        return f"{size / each:.3f}{unit}" if each > 1 else f"{max(1, int(size))}{unit}"


def case_of(seed: int, models: Models) -> Case:
    """The case of this number."""
    random = Random(seed)
    name = random.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
    kind, facts = KINDS[name], models.facts(name)
    cards = sizes(random, facts)
    draft = Draft(random, facts, cards, range(len(cards)))
    wrong = devices(draft)
    lora = kind.lora and draft.sometimes(0.2)
    dtype = "bfloat16" if draft.sometimes(0.1) else "float32"
    draft.words += ["--dtype", dtype]
    if lora:
        draft.words += ["--lora", f"{models.lora(name).name}={SCALE}"]
    requests, own, lines = asked(draft, kind, f"{seed}.jsonl")
    wrong = limits(draft) or places(draft) or switches(draft) or wrong
    store = f"store-{seed}" if draft.sometimes(0.2) else "memory"
    words = (kind.family, "--model", name, *draft.words, "--out", "out/", "--overwrite", "--artifacts", store,
             "--json", "-q")
    return Case(seed, name, tuple(cards), words, tuple(requests), own, tuple(lines), dtype, lora, wrong)


def sizes(random: Random, facts: Facts) -> list[int]:
    """One to four cards, from too small to ample."""
    count = random.choices((1, 2, 3, 4), (3, 4, 2, 1))[0]
    ample, tight, dealt = 1.3 * facts.most, 0.9 * facts.most, facts.least + facts.denoise / count
    base = random.choices((ample, tight, dealt, 0.3 * facts.most), (3, 3, 6, 1))[0]
    return [max(LEAST, int(base * random.uniform(0.7, 1.4))) for _ in range(count)]


def devices(draft: Draft) -> str:
    """Mostly all cards, otherwise some of them in another order, or the host."""
    if draft.sometimes(0.04):
        draft.words += ["--device", "cpu"]
        draft.used = []
    elif draft.sometimes(0.25):
        draft.used = draft.random.sample(range(len(draft.cards)), draft.random.randint(1, len(draft.cards)))
        if draft.sometimes(0.5):
            draft.words += ["--gpus", ",".join(map(str, draft.used))]
            if draft.sometimes(0.05):
                draft.words += ["--device", "sim:0"]
                return "--gpus beside --device"
        else:
            names = [f"sim:{card}" for card in draft.used] + (["cpu"] if draft.sometimes(0.2) else [])
            draft.words += [word for name in names for word in ("--device", name)]
    return ""


def asked(draft: Draft, kind: Kind, file: str) -> tuple[list[Request], frozenset[int], list[dict[str, Any]]]:
    """What to draw: one prompt, or a file of them."""
    random, family = draft.random, FAMILIES[kind.family]
    size, steps, seed, count = random.choice(SIZES), random.randint(kind.fewest, 3), random.randint(1, 2), 1
    draft.words += ["--size", size, "--steps", str(steps), "--seed", str(seed)]
    if draft.sometimes(0.35):
        count = random.randint(1, 3)
        draft.words += ["--count", str(count)]
    guided: dict[str, Any] = {"guidance": family.guidance, "negative_prompt": None}
    if family.guidance is not None and draft.sometimes(0.4):
        guided["guidance"] = random.choice(GUIDANCE)
        draft.words += ["--guidance", str(guided["guidance"])]
    if family.negative and guided["guidance"] > 1 and draft.sometimes(0.4):
        guided["negative_prompt"] = random.choice(NEGATIVE)
        draft.words += ["--negative-prompt", guided["negative_prompt"]]
    if draft.sometimes(0.7):
        prompt = random.choice(PROMPTS)
        draft.words += ["--prompt", prompt]
        made = requests_for(prompt, family, size=pair(size), steps=steps, seed=seed, count=count)
        return [replace(request, **guided) for request in made], frozenset(), []
    draft.words += ["--prompt-file", file]
    requests: list[Request] = []
    lines, own = list[dict[str, Any]](), set[int]()
    for _ in range(random.randint(1, 3)):
        line: dict[str, Any] = {"prompt": random.choice(PROMPTS)}
        line |= {"size": random.choice(SIZES)} if draft.sometimes(0.5) else {}
        line |= {"steps": random.randint(kind.fewest, 3)} if draft.sometimes(0.3) else {}
        line |= {"seed": random.randint(1, 2)} if draft.sometimes(0.3) else {}
        line |= {"count": random.randint(1, 2)} if draft.sometimes(0.2) else {}
        lines.append(line)
        at = len(requests)
        made = requests_for(line["prompt"], family, size=pair(line.get("size", size)), steps=line.get("steps", steps),
                            seed=line.get("seed", seed + at), count=line.get("count", count), index=at)
        own |= {request.index for request in made if "size" in line}
        requests += [replace(request, **guided) for request in made]
    return requests, frozenset(own), lines


def pair(size: str) -> tuple[int, int]:
    """Width and height."""
    width, _, height = size.partition("x")
    return int(width), int(height)


def limits(draft: Draft) -> str:
    """--max-memory, in one of its forms."""
    random = draft.random
    if not draft.sometimes(0.4):
        return ""
    smallest = min((draft.cards[card] for card in draft.used), default=10**9)
    if draft.sometimes(0.5) or not draft.used:
        draft.words.append(random.choice((
            f"--max-memory={draft.amount(smallest * random.uniform(0.2, 1.02))}",
            f"--max-memory={random.randint(20, 100)}%",
            f"--max-memory=-{draft.amount(smallest * random.uniform(0.05, 0.5))}",
            "--max-memory=none",
        )))
        return ""
    named = random.sample(list(draft.used), random.randint(1, len(draft.used)))
    parts = [f"{card}={draft.amount(draft.cards[card] * random.uniform(0.4, 1.0))}" if draft.sometimes(0.7) else
             f"sim:{card}={random.randint(30, 100)}%" for card in named]
    if draft.sometimes(0.4):
        parts.append(f"cpu={draft.amount(draft.facts.denoise * random.uniform(0.02, 0.6))}")
    if draft.sometimes(0.04):
        draft.words += ["--max-memory", ",".join([*parts, "7=1GiB"])]
        return "a limit of a card that there is not"
    draft.words += ["--max-memory", ",".join(parts)]
    return ""


def places(draft: Draft) -> str:
    """--place, of stages, components and blocks."""
    random, wrong = draft.random, ""
    while draft.sometimes(0.35):
        stage, component = random.choice(list(draft.facts.blocks))
        if draft.sometimes(0.5):
            stage, component = next(part for part in draft.facts.blocks if part[0] == "denoise")
        whole = sum(name == stage for name, _ in draft.facts.blocks) == 1 and draft.sometimes(0.5)
        what = stage if whole else f"{stage}.{component}"
        count = draft.facts.blocks[stage, component]
        if draft.sometimes(0.5) or not draft.used:
            draft.words += ["--place", f"{stage}={random.choice(STRATEGIES)}"]
        elif draft.sometimes(0.5) and count:
            off = draft.sometimes(0.05)
            wrong = "blocks that there are not" if off else wrong
            draft.words += ["--place", f"{what}={runs(draft, count + off)}"]
        elif draft.sometimes(0.05):
            draft.words += ["--place", f"{what}=sim:9"]
            wrong = "a card that there is not"
        else:
            card = random.choice(list(draft.used))
            draft.words += ["--place", f"{what}={random.choice((str(card), f'sim:{card}'))}"]
    return wrong


def runs(draft: Draft, count: int) -> str:
    """So many blocks over some of the cards, in runs."""
    random = draft.random
    cuts = sorted(random.sample(range(1, count), min(count - 1, random.randint(0, 3))))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, count], strict=True)]
    return ",".join(f"{random.choice(list(draft.used))}:{length}" for length in lengths)


def switches(draft: Draft) -> str:
    """The rest."""
    random = draft.random
    if draft.sometimes(0.4):
        draft.words += ["--allow-offload", random.choice(("none", "cpu", "cpu", "disk"))]
    if draft.sometimes(0.3):
        draft.words += ["--lanes", str(random.randint(1, 3))]
    if draft.sometimes(0.25):
        draft.words.append("--no-modulation-table")
    if draft.sometimes(0.2):
        draft.words.append("--no-p2p")
    if draft.sometimes(0.25):
        draft.words += ["--tile", random.choice(TILES)]
    if "--count" in draft.words and draft.sometimes(0.04):
        draft.words += ["--seed", "3"]
        return "--count beside several seeds"
    return ""
