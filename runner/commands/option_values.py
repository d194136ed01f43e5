"""What the text of an option means: each is read here, whether a command line, a variable or a file says it."""

import re
from collections.abc import Sequence

from runner.inputs import SEED, SIDE, STEPS, check_size, read_size, read_whole
from runner.job_fields import DTYPES, LANES, LONGEST, type_name
from runner.machine_option import means_machine
from runner.placement_options import PROCESSES, MemoryLimits
from runner.request import COUNT
from runner.text import quoted, shown
from stages.errors import InvalidInput
from stages.models.lora import NONE, LoraRequest, read_loras
from stages.models.scheduler import SchedulerRequest

ALL = "all"


def devices(names: Sequence[str], gpus: str | None) -> tuple[str, ...]:
    """The devices that --device or --gpus choose, none for all there are; InvalidInput for both and for nonsense."""
    if gpus is None:
        for name in names:
            _check_elsewhere("device", name)
            if not re.fullmatch("[a-z]{1,16}(:[0-9]{1,3})?", name):
                raise InvalidInput(f"--device {shown(name)} is no device -> such as cpu, cuda:0")
        return tuple(names)
    if names:
        raise InvalidInput("--gpus and --device both choose devices -> leave one of them out")
    if gpus == ALL:
        return ()
    if not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3})*", gpus):
        _check_elsewhere("gpus", gpus)
        raise InvalidInput(f"--gpus {shown(gpus)}: write the numbers of cards, such as 0,1, or {ALL}")
    return tuple(gpus.split(","))


def _check_elsewhere(name: str, text: str) -> None:
    """Raise InvalidInput for cards by their names: those that are here have numbers."""
    if means_machine(text):
        raise InvalidInput(f"--{name} {shown(text)} names a kind of card, and those of this machine have numbers -> "
                           f"such as {'0,1' if name == 'gpus' else 'cuda:0'}; for cards that are not here, the "
                           f"command plan with --machine {quoted(text)}")


def seconds(name: str, text: str) -> float:
    """Seconds from an option, from 0 to a day."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) > LONGEST:
        raise InvalidInput(f"{name} must be seconds from 0 to {LONGEST:,.0f}, got {shown(text)}")
    return float(text)


def rank_timeout(text: str) -> float:
    """Seconds in which a rank may do nothing."""
    return float(read_whole("rank-timeout", text, 1, int(LONGEST)))


def ranks(text: str) -> int | None:
    """How many ranks; None for `none`."""
    return None if text == NONE else read_whole("ranks", text, 1, PROCESSES)


def lanes(text: str) -> int | None:
    """How many lanes; None for `none`: as many as keep the cards busy."""
    return None if text == NONE else read_whole("lanes", text, 1, LANES)


def preview(text: str) -> int:
    """Steps from one rough picture to the next; 0 for `none`."""
    return 0 if text == NONE else read_whole("preview", text, 0, STEPS)


def limits(text: str | None, before: MemoryLimits) -> MemoryLimits:
    """The limits that --max-memory spells; without it those from `before`, and none for `none`."""
    return before if text is None else MemoryLimits() if text == NONE else MemoryLimits.read(text)


def seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """The seeds that --seed lists, such as 7 or 1,2,3; InvalidInput for -1, which draws one, among several."""
    listed = [text for each in texts for text in each.split(",")]
    found = tuple(read_whole("seed", text, -1 if len(listed) == 1 else 0, SEED) for text in listed[: COUNT + 1])
    if len(found) > COUNT:
        raise InvalidInput(f"--seed lists {len(listed):,} seeds; the limit is {COUNT}")
    return found


def size(
    text: str | None, width: str | None, height: str | None, before: tuple[int, int]
) -> tuple[int, int] | None:
    """Width and height in pixels from --size, or of one side and the other one from `before`; None where none is said.
    """
    if text is not None:
        if width is not None or height is not None:
            raise InvalidInput("--size and --width or --height both say the size -> leave one of them out")
        return read_size(text)
    if width is None and height is None:
        return None
    sides = (before[0] if width is None else read_whole("width", width, 1, SIDE),
             before[1] if height is None else read_whole("height", height, 1, SIDE))
    check_size(*sides)
    return sides


def dtypes(texts: Sequence[str]) -> dict[str, str]:
    """Types by component from `bfloat16` (all, under "") and `vae=fp32`; InvalidInput for another or two."""
    found: dict[str, str] = {}
    for text in texts:
        component, _, spelled = text.rpartition("=")
        dtype = type_name(spelled)
        if dtype not in DTYPES:
            raise InvalidInput(f"--dtype {shown(text)}: choose one of {', '.join(DTYPES)}, or COMPONENT=TYPE")
        if component in found:
            raise InvalidInput(f"--dtype is said twice for {shown(component) if component else 'all components'}")
        found[component] = dtype
    return found


def loras(texts: Sequence[str], before: tuple[LoraRequest, ...]) -> tuple[LoraRequest, ...]:
    """The LoRAs that are asked for: those of a picture `before` unless some are named, or `none`."""
    if NONE in texts:
        if len(texts) > 1:
            raise InvalidInput(f"--lora {NONE} and other LoRAs contradict each other -> leave one of them out")
        return ()
    return read_loras(texts) or before



def scheduler(text: str | None, before: SchedulerRequest | None) -> SchedulerRequest | None:
    """The scheduler that --scheduler spells; without it that of a picture `before`, and the model's own for `none`."""
    return before if text is None else None if text == NONE else SchedulerRequest.read(text)
