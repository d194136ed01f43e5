"""What holds for every run of a user: variables and a file, behind the command line and in front of the family.

A setting never says what is drawn: no prompt, no seed. Where a picture is repeated, the picture says what decides
about its pixels; a run that is resumed has all of it in its record.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from runner.commands import option_values
from runner.commands.habits import option_for
from runner.commands.options import FamilyOptions, ResumeOptions, RunOptions
from runner.distributed.env import PIPE
from runner.inputs import STEPS, read_guidance, read_size, read_whole
from runner.job import STAGES
from runner.job_defaults import default_store
from runner.job_fields import places
from runner.media.paths import check_out
from runner.placement_options import MemoryLimits
from runner.text import choices, clean, shown
from stages.errors import InvalidInput
from stages.families import FAMILIES

CONFIG, PREFIX = "STAGERUN_CONFIG", "STAGERUN_"
LARGEST = 2**20
Options = TypeVar("Options", bound=RunOptions)
Text = str | list[str]


def _choice(*choices: str) -> Callable[[str], object]:
    def check(text: str) -> None:
        if text not in choices:
            raise InvalidInput(f"{shown(text)} -> choose from {', '.join(choices)}")

    return check


def _named(text: str) -> None:
    if not text or not text.isprintable():
        raise InvalidInput(f"{shown(text)} is no name")


# What may be set, with what raises InvalidInput for a text that it cannot be.
ANYWHERE: Mapping[str, Callable[[Any], object]] = {
    "model": _named,
    "dtype": option_values.dtypes,
    "out": check_out,
    "artifacts": _named,
    "step-every": partial(option_values.seconds, "step-every"),
    "preview": option_values.preview,
    "engine": _choice("local", "ray"),
    "ranks": option_values.ranks,
    "rank-timeout": option_values.rank_timeout,
    "gpus": lambda text: option_values.devices((), text),
    "device": lambda names: option_values.devices(names, None),
    "max-memory": lambda text: option_values.limits(text, MemoryLimits()),
    "place": lambda texts: places(texts, STAGES),
    "allow-offload": _choice("cpu", "disk", "none"),
    "lanes": option_values.lanes,
}
# What makes sense for one family alone stands in its table of the file.
OF_A_FAMILY: Mapping[str, Callable[[Any], object]] = {
    "size": read_size, "steps": lambda text: read_whole("steps", text, 1, STEPS), "guidance": read_guidance,
}
SETTINGS = {**OF_A_FAMILY, **ANYWHERE}
LISTS = frozenset(("dtype", "device", "place"))
PATHS = frozenset(("model", "out", "artifacts"))
# A picture that is repeated says these itself.
_PIXELS = frozenset(("model", "dtype", "size", "steps", "guidance"))


@dataclass(frozen=True)
class Setting:
    """What a variable or a file says."""

    value: Text
    """As the option takes it; a list where the option may be repeated."""
    origin: str
    """The variable, or the file with the line."""


Layer = Mapping[str, Setting]


def settled(options: Options, family: str, *, launched: bool = False) -> tuple[Options, dict[str, str]]:
    """The options with what variables and the file say where the command line says nothing, and where it came from.

    `launched` is whether a launcher decides about processes. Raises InvalidInput, with the variable or with the file,
    line and key, for what cannot be.
    """
    origins: dict[str, str] = {}
    # The strongest first: what it says is said for the weaker ones.
    for layer in layers(family, getattr(options, "model", None)):
        for name, setting in layer.items():
            if _holds(name, options, family, launched):
                change: dict[str, Any] = {_field(name): setting.value}
                options = replace(options, **change)
                origins[name] = setting.origin
    return options, origins


def layers(family: str, model: str | None = None) -> Iterator[Layer]:
    """What is set, the strongest first: the variables, the family's table of the file, and the rest of the file."""
    variables = _variables()
    tables = _file()
    yield variables
    chosen = variables["model"].value if model is None and "model" in variables and family != "demo" else model
    # The demo checkpoint has sizes and steps of its own, whichever family it is run as.
    yield tables.get("demo" if chosen == "demo" else family, {})
    yield tables.get("", {})


def usual_store(environ: Mapping[str, str] = os.environ) -> str:
    """The store that commands use unless they name another."""
    layers = (_variables(environ), _file(environ).get("", {}))
    setting = next((layer["artifacts"] for layer in layers if "artifacts" in layer), None)
    return str(default_store()) if setting is None else str(setting.value)


def unsaid_store() -> str:
    """The store that a command finds which does not name one, pasted into this shell or another.

    Empty where these differ, as a variable names it here, and where the settings cannot be read.
    """
    names = (variable("artifacts"), *([CONFIG] if os.environ.get(CONFIG) else []))
    with suppress(InvalidInput):
        here, there = usual_store(), usual_store({name: os.environ[name] for name in os.environ if name not in names})
        return here if here == there else ""
    return ""


def config_path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file of settings, whether it is there or not; None where STAGERUN_CONFIG is set to nothing."""
    named = environ.get(CONFIG)
    if named is not None:
        return Path(named).expanduser() if named else None
    home = environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".config") / "stagerun/config.toml"


def variable(name: str) -> str:
    """The variable of a setting."""
    return f"{PREFIX}{name.upper().replace('-', '_')}"


def _field(name: str) -> str:
    return name.replace("-", "_")


def _holds(name: str, options: RunOptions, family: str, launched: bool) -> bool:
    """Whether a setting is of use: it gives way to what is said of it, and to what it would contradict."""
    said = {each.name for each in fields(options) if getattr(options, each.name) not in (None, False, [], ())}
    if isinstance(options, ResumeOptions):
        # All else is in the record of the run.
        return name == "artifacts" and "artifacts" not in said
    if _field(name) in said or _field(name) not in {each.name for each in fields(options)}:
        return False
    if isinstance(options, FamilyOptions) and options.like is not None and name in _PIXELS:
        return False
    by_ray = options.engine == "ray"
    tensor_parallel = any("tensor_parallel" in text for text in options.place or ())
    gives_way = {
        "model": family == "demo",
        "gpus": "device" in said or by_ray,
        "device": "gpus" in said,
        "ranks": by_ray or launched,
        "engine": launched or tensor_parallel or bool(said & {"ranks", "gpus"}) or options.artifacts == "memory",
        "out": "stop_after" in said,
    }
    return not gives_way.get(name, False)


def _variables(environ: Mapping[str, str] = os.environ) -> Layer:
    found: dict[str, Setting] = {}
    known = {variable(name): name for name in ANYWHERE}
    for unknown in sorted(environ.keys() - known.keys() - {CONFIG, PIPE}):
        if unknown.startswith(PREFIX) and environ[unknown]:
            raise InvalidInput(_no_variable(unknown, known))
    for each, name in known.items():
        text = environ.get(each)
        if text:
            try:
                found[name] = Setting(_checked(name, text.split() if name in LISTS else text), each)
            except InvalidInput as error:
                raise InvalidInput(f"{each}: {error.text}") from None
    _check_together(found)
    return found


def _no_variable(name: str, known: Iterable[str]) -> str:
    """What to say of a variable that is no setting."""
    if name.upper() in map(variable, OF_A_FAMILY):
        return f"{clean(name)}: it is of one family -> write it into the file of settings, below the line [flux]"
    close = _near(name.removeprefix(PREFIX).lower().replace("_", "-"), (*ANYWHERE, "config"))
    hint = f"did you mean {variable(close[0])}?" if close else f"unset it; there are {', '.join(known)}"
    return f"{clean(name)}: there is no such setting -> {hint}"


def _near(name: str, known: Collection[str]) -> list[str]:
    """The setting that is meant by another name: what other programs call it, or what is most like it."""
    habit = option_for(name, [f"--{each}" for each in known])
    return get_close_matches(name, known, 1) if habit is None else [habit.partition(" ")[0].removeprefix("--")]


def _file(environ: Mapping[str, str] = os.environ) -> dict[str, Layer]:
    """The tables of the file by family, with what stands in none under ""; nothing where there is no file."""
    path = config_path(environ)
    if path is None or (CONFIG not in environ and not path.exists()):
        return {}
    text = _text(path)
    import tomllib

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line ([0-9]+)", str(error))
        where = f"line {line[1]}" if line else f"line {text.count(chr(10)) + 1}"
        raise InvalidInput(f"{path}, {where}: it is no TOML ({error}) -> such as max-memory = \"14GiB\"") from None
    top = {key: value for key, value in document.items() if not isinstance(value, dict)}
    found = {"": _layer(path, text, "", top)}
    for table, values in document.items():
        if isinstance(values, dict):
            found[table] = _layer(path, text, table, values)
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror} -> name another with {CONFIG}, or set that to "
                           f"nothing") from None
    if len(data) > LARGEST:
        raise InvalidInput(f"{path} has more than {LARGEST:,} bytes -> name another with {CONFIG}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{path}, line {line}: it is not valid UTF-8 -> save it as UTF-8") from None


def _layer(path: Path, text: str, table: str, values: Mapping[str, Any]) -> Layer:
    if table and table not in FAMILIES:
        raise InvalidInput(f"{path}, line {_line(text, table, '')}: there is no family {shown(table)} -> "
                           f"{choices(table, FAMILIES)}")
    found: dict[str, Setting] = {}
    for key, value in values.items():
        name, line = key.replace("_", "-"), _line(text, table, key)
        try:
            found[name] = Setting(_of_file(name, table, value), f"{path}, line {line}")
        except InvalidInput as error:
            raise InvalidInput(f"{path}, line {line}: {shown(key)[1:-1]}: {error.text}") from None
    _check_together(found)
    return found


def _check_together(layer: Layer) -> None:
    """Raise InvalidInput for two settings of one place that contradict each other."""
    by_ray = "engine" in layer and layer["engine"].value == "ray"
    for name, other in (("device", "gpus"), *((("ranks", "engine"), ("gpus", "engine")) if by_ray else ())):
        if name in layer and other in layer:
            raise InvalidInput(f"{layer[name].origin}: {name} and {other} contradict each other -> leave one of "
                               f"them out")


def _of_file(name: str, table: str, value: Any) -> Text:
    """What a key says; InvalidInput where there is no such key there, or it says what cannot be."""
    if name not in SETTINGS:
        close = _near(name, SETTINGS)
        raise InvalidInput(f"there is no such setting -> {f'did you mean {close[0]}?' if close else ''}"
                           f"{'' if close else ', '.join(SETTINGS)}")
    if name in OF_A_FAMILY and not table:
        raise InvalidInput("it is of one family -> write it below the line [flux], or of another family")
    if name == "guidance" and FAMILIES[table].guidance is None:
        raise InvalidInput(f"{table} takes no guidance -> leave it out")
    several = value if isinstance(value, list) else [value]
    if not several or any(isinstance(each, bool) or not isinstance(each, str | int | float) for each in several):
        raise InvalidInput(f"{shown(str(value))} is no text and no number -> such as {name} = \"...\"")
    texts = [str(each) for each in several]
    if name not in LISTS and isinstance(value, list):
        if name != "gpus":
            raise InvalidInput("it is a list -> give one text or number")
        texts = [",".join(texts)]
    return _checked(name, texts if name in LISTS else texts[0])


def _checked(name: str, value: Text) -> Text:
    SETTINGS[name](value)
    return os.path.expanduser(value) if name in PATHS and isinstance(value, str) else value


def _line(text: str, table: str, key: str) -> int:
    """The number of the line that has a key of a table, or the head of the table; the nearest that can be found."""
    current, head = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"\s*\[\s*[\"']?([^\]\"']+?)[\"']?\s*\]", line):
            current = found[1]
            head = number if current == table else head
        elif re.match(rf"\s*[\"']?{re.escape(table)}[\"']?\s*[.=]", line) and table and not current:
            head = number
        if key and current == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
        if key and table and re.match(rf"\s*{re.escape(table)}\s*\.\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return head

