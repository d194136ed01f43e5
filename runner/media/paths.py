"""Where pictures go: file names from `out`, and files that are there whole or not at all."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile

from runner.artifacts import atomic_files, temp_files
from runner.media.formats import FORMATS, SUFFIXES, check_room
from runner.request import FilledRequest
from runner.text import shown
from stages.errors import InvalidInput, StoreError

ONE, MANY = "{prompt}-{seed}.png", "{index}-{prompt}-{seed}.png"
FIELDS = ("id", "index", "prompt", "run", "seed")
SLUG = 60
NAME = 255


class Unnamed(InvalidInput):
    """A picture that cannot be named by what its own line says."""


class Naming:
    """How `out` names the pictures of a run: a file, a folder, or a template with {index} {seed} {prompt} {run}.

    Only what `out` spells itself can name a folder; what replaces a field is a short ASCII slug. `total` is how many
    pictures there are, with those that are left out.
    """

    def __init__(self, out: str | None, *, run: str, total: int, overwrite: bool = False) -> None:
        self._default = ONE if total == 1 else MANY
        self._root, self._parts = _pattern(out, self._default)
        self._run, self._width, self._overwrite = slug(run), len(str(total - 1)), overwrite
        self._taken: set[Path] = set()
        self._folders: set[Path] = set()

    @property
    def folder(self) -> Path:
        """The folder that all pictures lie in, or below."""
        return self._root

    def path(self, request: FilledRequest, id: str | None = None, out: str | None = None) -> Path:
        """The path of a picture, `out` being what its own line says; InvalidInput where it is taken or not writable.

        Unnamed where the reason is in its line.
        """
        try:
            parts = self._parts if out is None else self._own(out)
            if id is None and any("{id}" in part for part in parts):
                raise Unnamed("`out` has the field {id}, and there is no id -> give the line one")
            path = self._root.joinpath(*(_fill(part, self._fields(request, id)) for part in parts))
            self._check(path, parts[-1])
            prompts = f"{request.prompt}{request.negative_prompt or ''}"
            check_room(path, len(prompts.encode()), max(request.width, request.height))
        except InvalidInput as error:
            raise error if out is None else Unnamed(f"out {shown(out)}: {error.text}") from None
        self._taken.add(path)
        return path

    def _own(self, out: str) -> tuple[str, ...]:
        """What the line of a picture says, which may come from anybody: it stays inside the folder of `out`."""
        folder, parts = _pattern(out, self._default)
        if folder.is_absolute() or ".." in folder.parts:
            raise InvalidInput(f"it leads out of {self._root} -> write a path inside, and that folder into `out`")
        return (*folder.parts, *parts)

    def _fields(self, request: FilledRequest, id: str | None) -> dict[str, str]:
        return {"index": f"{request.index:0{self._width}d}", "seed": str(request.seed), "prompt": slug(request.prompt),
                "run": self._run, "id": id or ""}

    def _check(self, path: Path, pattern: str) -> None:
        if path in self._taken:
            stem, suffix = os.path.splitext(pattern)
            better = self._root / f"{stem}-{{index}}{suffix}"
            raise InvalidInput(f"two pictures cannot both be {path} -> `out={better}`")
        longest = max(path.parts, key=lambda part: len(part.encode()))
        if len(longest.encode()) > NAME:
            raise InvalidInput(f"`out` has a name of {len(longest.encode())} bytes; the limit is {NAME}: "
                             f"{shown(longest)}")
        if path.parent not in self._folders:
            _check_folder(path.parent, self._root)
            self._folders.add(path.parent)
        if os.path.lexists(path) and (not self._overwrite or (os.path.isdir(path) and not path.is_symlink())):
            raise InvalidInput(taken(path))


def check_out(out: str) -> None:
    """Raise InvalidInput for an `out` that names no pictures, whatever they are."""
    _, parts = _pattern(out, ONE)
    for part in parts:
        _fill(part, dict.fromkeys(FIELDS, ""))


def slug(text: str) -> str:
    """At most 60 of the characters a-z, 0-9 and inner dashes that say `text` best; `picture` where none does."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")[:SLUG].strip("-") or "picture"


def check_recorded(names: Sequence[str], folder: str) -> None:
    """Raise InvalidInput for paths of a record that `out` could not have led to, `folder` being the one it named."""
    checked: set[Path] = set()
    for name in names:
        root, parts = _pattern(name, "")
        path = root.joinpath(*parts)
        if ".." in path.parts or parts == ("",):
            raise InvalidInput(f"{shown(name)} is no path of a picture")
        if path.parent not in checked:
            _check_folder(path.parent, Path(folder) if folder else path.parent)
            checked.add(path.parent)


def write(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Put a file at `path`, on the disk when it returns; a symlink at `path` is replaced, never followed.

    Raises InvalidInput where `path` is taken meanwhile, StoreError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.put(path, data, overwrite=overwrite)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.parent.is_dir():
            raise InvalidInput(taken(path)) from None
        text = f"cannot write {path} ({len(data):,} bytes): {error.strerror}"
        raise StoreError(f"{text} -> make room or choose another `out`; what the store keeps is not lost") from error


def remove_orphans(paths: Sequence[str]) -> None:
    """Remove what killed processes left beside these paths while they wrote them."""
    for folder in dict.fromkeys(path.parent for path in map(Path, paths)):
        temp_files.remove_orphans(folder, ".")


def _pattern(out: str | None, default: str) -> tuple[Path, tuple[str, ...]]:
    """The folder that `out` names, and the parts below it that may hold fields; the last is the file's name."""
    if out is None:
        return Path(), (default,)
    bad = next((c for c in out if unicodedata.category(c) in ("Cc", "Cs")), None)
    if bad is not None or not out:
        raise InvalidInput(f"`out` is {'empty' if bad is None else 'no name for a file'}: {shown(out)}")
    if out.endswith(("/", os.sep)) or os.path.isdir(out):
        return Path(out), (default,)
    parts = Path(out).parts
    at = next((i for i, part in enumerate(parts) if re.search("{.*}", part)), len(parts) - 1)
    if ".." in parts[at:]:
        raise InvalidInput(f"`out` {shown(out)} leaves its folder behind a field -> write .. before the first field")
    if Path(parts[-1]).suffix.lower() not in FORMATS:
        raise InvalidInput(f"`out` {shown(out)} must end in {SUFFIXES}, or in / for a folder")
    return Path(*parts[:at]), parts[at:]


def _fill(part: str, fields: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            close = get_close_matches(match[1], FIELDS, 1)
            hint = f"did you mean {{{close[0]}}}?" if close else "there are " + " ".join(f"{{{f}}}" for f in FIELDS)
            raise InvalidInput(f"`out` has the unknown field {shown(match[0])}: {hint}")
        return fields[match[1]]

    return re.sub(r"\{([^{}]*)\}", value, part)


def _check_folder(folder: Path, root: Path) -> None:
    home, real = os.path.realpath(root), os.path.realpath(folder)
    if os.path.commonpath((home, real)) != home:
        raise InvalidInput(f"{folder} leads out of {root} by a symlink -> remove the symlink or name {real}")
    there = next(parent for parent in (Path(real), *Path(real).parents) if os.path.exists(parent))
    if not there.is_dir():
        raise InvalidInput(f"{there} is not a folder -> choose another `out`")
    try:
        # By trying: what a file system allows is more than what permissions say.
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InvalidInput(f"cannot write in {there} ({error.strerror}) -> choose another `out`") from None


def taken(path: Path) -> str:
    """What to say of a path where something is already."""
    if path.is_dir():
        return f"{path} is a folder -> write {path}/ to put pictures inside"
    return f"{path} is there already -> `overwrite=True`, or another `out`"
