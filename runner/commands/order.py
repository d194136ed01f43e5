"""What a command line asks for, checked as a whole before anything heavy is imported."""

import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.commands.batch import Batch, Defaults, Item, Refused, batch
from runner.commands.prompts import Entry, read_prompts
from runner.distributed.env import launched
from runner.media import image
from runner.media.image import Like
from runner.media.paths import Naming, Unnamed
from runner.request import COUNT, PROMPT_BYTES, SEED, STEPS, Request, read_guidance, read_size, read_whole
from runner.text import shown
from stages.families import FAMILIES
from stages.models.lora import NONE, LoraRequest, read_loras

DTYPES = ("float32", "bfloat16", "float16")
STAGES = ("encode", "denoise", "decode")
STEP_EVERY = 10.0
DAY = 24 * 3600


@dataclass(frozen=True)
class Origin:
    """What an order repeats, such as "the picture": the model's `identity` then; `advice` for where it is another."""

    what: str
    identity: str
    advice: str


@dataclass(frozen=True)
class Order:
    """The checked order: which model, which pictures, which files, and how to go about it.

    `paths` is empty for a run that stops before there are pictures; `refused` are lines of the prompt file that make
    none; `dtype` maps components ("" for all others) to names of types; a `resumed` order may find its pictures there.
    """

    family: str
    model: str | None
    revision: str | None
    items: tuple[Item, ...]
    refused: tuple[Refused, ...]
    run: str
    paths: tuple[Path, ...]
    dtype: Mapping[str, str]
    devices: tuple[str, ...]
    store: str
    preview: int = 0
    step_every: float = STEP_EVERY
    origin: Origin | None = None
    resumed: bool = False
    loras: tuple[LoraRequest, ...] = ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests of all pictures."""
        return tuple(item.request for item in self.items)

    @property
    def listed(self) -> bool:
        """Whether the pictures come from the lines of a file."""
        return bool(self.refused) or self.items[0].line > 0

    def without(self, lost: Mapping[int, str]) -> "Order":
        """The order less the pictures with these indices, whose lines are refused for these reasons."""
        at = [at for at, item in enumerate(self.items) if item.request.index not in lost]
        refused = [Refused(item.line, lost[item.request.index]) for item in self.items if item.request.index in lost]
        return replace(self, items=tuple(self.items[i] for i in at), refused=tuple(sorted({*self.refused, *refused})),
                       paths=tuple(self.paths[i] for i in at) if self.paths else ())


def order(family: str, said: Any) -> Order:
    """The order in the options `said` of a command line; ValueError for the first thing that cannot be."""
    like = image.like(said.like) if said.like is not None else None
    model = said.model if said.model is not None or like is None else model_of(like)
    if model == "":
        raise ValueError("--model is empty -> name a hub id, a folder or demo")
    chosen = FAMILIES["demo" if model == "demo" else family]
    if like is not None and like.family != chosen.name:
        raise ValueError(f"{said.like} was made by {like.family} -> runner {like.family} --like {said.like}")
    asked = batch(_entries(said, like), chosen, _defaults(said, like.request if like is not None else None))
    _check_together(said)
    run = new_run()
    items, paths, refused = _named(asked, said, run)
    return Order(
        family=family,
        model=model,
        revision=like.revision if like is not None and said.revision is said.model is None else said.revision,
        items=items,
        refused=refused,
        run=run,
        paths=paths,
        dtype=read_dtypes(said.dtype or ()) or (like.dtype if like is not None else {}),
        devices=devices(said.device or (), said.gpus),
        store=said.artifacts or str(default_store()),
        preview=read_preview(said.preview),
        step_every=read_every(said.step_every),
        origin=None if like is None or said.model is not None else Origin(
            "the picture", like.identity, "name a model with --model to repeat it with other pixels"),
        loras=chosen_loras(said.lora or (), like.loras if like is not None else ()),
    )


def new_run() -> str:
    """A name for a run that no other has."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def model_of(like: Like) -> str:
    """The model of a picture, as --model takes it: the demo checkpoint lies elsewhere on another machine."""
    return "demo" if like.family == "demo" else like.model


def read_dtypes(texts: Sequence[str]) -> dict[str, str]:
    """Types by component from `bfloat16` (all, under "") and `vae=float32`; ValueError for another or a second one."""
    found: dict[str, str] = {}
    for text in texts:
        component, _, dtype = text.rpartition("=")
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {shown(text)}: choose one of {', '.join(DTYPES)}, or COMPONENT=TYPE")
        if component in found:
            raise ValueError(f"--dtype is said twice for {shown(component) if component else 'all components'}")
        found[component] = dtype
    return found


def chosen_loras(texts: Sequence[str], before: tuple[LoraRequest, ...]) -> tuple[LoraRequest, ...]:
    """The LoRAs that are asked for: those of a picture `before` unless some are named, or `none`."""
    if NONE in texts:
        if len(texts) > 1:
            raise ValueError(f"--lora {NONE} and other LoRAs contradict each other -> leave one of them out")
        return ()
    return read_loras(texts) or before


def read_preview(text: str | None) -> int:
    """Steps from one rough picture to the next; 0 for none."""
    return 0 if text is None else read_whole("preview", text, 1, STEPS)


def read_every(text: str | None) -> float:
    """Seconds after which an unfinished denoise is kept; 0 for after every step."""
    return STEP_EVERY if text is None else float(read_whole("step-every", text, 0, DAY))


def default_store() -> Path:
    """The folder where artifacts are kept unless --artifacts says otherwise: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~")
    if not os.path.isabs(cache) and not os.path.isabs(home):
        raise ValueError("there is no home folder to keep artifacts in -> --artifacts DIR, or --artifacts memory")
    return (Path(cache) if os.path.isabs(cache) else Path(home) / ".cache") / "stagerun" / "store"


def _entries(said: Any, like: Like | None) -> list[Entry]:
    if said.prompt_file is not None:
        if said.prompt is not None:
            raise ValueError("--prompt and --prompt-file both say what to draw -> leave one of them out")
        return read_prompts(said.prompt_file)
    if said.prompt is None and like is None:
        raise ValueError('there is no prompt -> --prompt "a red circle", --prompt - or --prompt-file FILE to read it')
    prompt = like.request.prompt if like is not None and said.prompt is None else _read_prompt(said.prompt)
    return [Entry(0, {"prompt": prompt})]


def _defaults(said: Any, before: Request | None) -> Defaults:
    options: dict[str, Any] = {}
    if before is not None:
        options = {name: getattr(before, name) for name in ("steps", "guidance", "text_tokens", "negative_prompt")}
        options["size"] = before.width, before.height
    told = ((name, getattr(said, name), read) for name, read in READERS.items())
    options |= {name: read(text) for name, text, read in told if text is not None}
    seeds = read_seeds(said.seed) if said.seed else (-1 if before is None else before.seed,)
    if len(seeds) > 1 and said.count is not None:
        raise ValueError("--count and several seeds contradict each other -> leave one of them out")
    return Defaults(options, seeds, 1 if said.count is None else read_whole("count", said.count, 1, COUNT))


def read_seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """The seeds that --seed lists, such as 7 or 1,2,3; ValueError for -1, which draws one, among several."""
    listed = [text for each in texts for text in each.split(",")]
    seeds = tuple(read_whole("seed", text, -1 if len(listed) == 1 else 0, SEED) for text in listed[: COUNT + 1])
    if len(seeds) > COUNT:
        raise ValueError(f"--seed lists {len(listed):,} seeds; the limit is {COUNT}")
    return seeds


def _named(asked: Batch, said: Any, run: str) -> tuple[tuple[Item, ...], tuple[Path, ...], tuple[Refused, ...]]:
    """The items that have a name, their paths, and the lines refused so far; ValueError where no item is left."""
    naming = Naming(said.out, run=run, total=asked.total, overwrite=said.overwrite)
    items, paths, refused = list[Item](), list[Path](), list(asked.refused)
    for item in asked.items:
        try:
            paths += [] if said.stop_after else [naming.path(item.request, item.id, item.out)]
            items.append(item)
        except Unnamed as error:
            if not item.line:
                raise
            refused.append(Refused(item.line, str(error)))
    refused.sort(key=lambda line: line.line)
    if not items:
        more = f"; so are {len(refused) - 1:,} more" if len(refused) > 1 else ""
        raise ValueError(f"--prompt-file {shown(said.prompt_file)} has no good line: {refused[0]}{more}")
    return tuple(items), tuple(paths), tuple(refused)


def _read_prompt(text: str) -> str:
    """The prompt, from standard input where it is `-`, then without the line end behind it."""
    if text != "-":
        return text
    data = sys.stdin.buffer.read(PROMPT_BYTES + 3)
    if len(data.rstrip(b"\r\n")) > PROMPT_BYTES:
        raise ValueError(f"the prompt has more than {PROMPT_BYTES:,} bytes -> shorten it")
    try:
        return data.decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8 at byte {error.start} -> write it again in UTF-8") from None


def _check_together(said: Any) -> None:
    if said.quiet and said.verbose:
        raise ValueError("--quiet and --verbose contradict each other -> leave one of them out")
    if said.preview is not None and (said.ranks is not None or launched() is not None):
        raise ValueError("--preview is for one process, and ranks are several -> leave one of them out")
    last = said.stop_after or "decode"
    if said.stop_after and said.out is not None:
        raise ValueError(f"--stop-after {last} makes no picture -> leave --out out")
    if said.from_stage and STAGES.index(said.from_stage) > STAGES.index(last):
        raise ValueError(f"--from-stage {said.from_stage} comes after --stop-after {last} -> leave one of them out")
    if said.from_stage in STAGES[1:] and said.artifacts == "memory":
        raise ValueError(f"--from-stage {said.from_stage} needs artifacts of a run before -> --artifacts DIR")


def check_engine(said: Any) -> None:
    """Raise ValueError for options that contradict --engine ray."""
    if said.engine != "ray":
        return
    if launched() is not None:
        raise ValueError("--engine ray starts processes of its own, and a launcher started this one -> leave one out")
    for option in ("ranks", "preview", "gpus"):
        if getattr(said, option) is not None:
            raise ValueError(f"--{option} has no meaning with --engine ray, which deals out cards and pictures itself "
                             f"-> leave one of them out")
    if any("tensor_parallel" in text for text in said.place or ()):
        raise ValueError("--engine ray and denoise=tensor_parallel contradict each other -> leave one of them out")
    if said.artifacts == "memory":
        raise ValueError("--engine ray needs a store that all its workers share -> --artifacts DIR or URL")


def devices(names: Sequence[str], gpus: str | None) -> tuple[str, ...]:
    """The devices that --device or --gpus choose, none for all there are; ValueError for both and for nonsense."""
    if gpus is None:
        return tuple(_device(name) for name in names)
    if names:
        raise ValueError("--gpus and --device both choose devices -> leave one of them out")
    if not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3})*", gpus):
        raise ValueError(f"--gpus {shown(gpus)}: write the numbers of cards, such as 0,1")
    return tuple(gpus.split(","))


def _device(text: str) -> str:
    if not re.fullmatch("[a-z]{1,16}(:[0-9]{1,3})?", text):
        raise ValueError(f"--device {shown(text)} is no device -> such as cpu, cuda:0")
    return text


READERS: dict[str, Callable[[str], Any]] = {
    "size": read_size,
    "steps": lambda text: read_whole("steps", text, 1, STEPS),
    "guidance": read_guidance,
    "negative_prompt": str,
}
