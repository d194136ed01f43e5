"""Where pictures go: file names from --out, and files that are there whole or not at all."""

import errno
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from runner.request import Request, shown
from stages.errors import StoreError

DEFAULT = "{prompt}-{seed}.png"
FIELDS = ("index", "prompt", "run", "seed")
SLUG = 60
NAME = 255


def choose(out: str | None, requests: Sequence[Request], *, run: str, overwrite: bool = False) -> list[Path]:
    """One path per request: `out` is a .png file, a folder, or a template with {index} {seed} {prompt} {run}.

    Only what `out` spells itself can name a folder; what replaces a field is a short ASCII slug. Raises ValueError for
    a name that is taken (unless `overwrite`), used twice, not writable or not a .png.
    """
    root, pattern = _pattern(out)
    width = len(str(len(requests) - 1))
    chosen = []
    for request in requests:
        fields = {"index": f"{request.index:0{width}d}", "seed": str(request.seed), "prompt": slug(request.prompt)}
        path = root.joinpath(*(_fill(part, {**fields, "run": slug(run)}) for part in pattern))
        _check(path, root, overwrite)
        chosen.append(path)
    if len(set(chosen)) < len(chosen):
        stem, suffix = os.path.splitext(pattern[-1])
        raise ValueError(
            f"{len(chosen)} pictures cannot all be {chosen[0]} -> --out '{root / (stem + '-{index}' + suffix)}'"
        )
    return chosen


def slug(text: str) -> str:
    """At most 60 of the characters a-z, 0-9 and inner dashes that say `text` best; `picture` where none does."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")[:SLUG].strip("-") or "picture"


def write(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Put a file at `path`: written beside it, fsynced, renamed; a symlink at `path` is replaced, never followed.

    Raises ValueError where `path` is taken meanwhile, StoreError where it cannot be written.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        _publish(part, path, overwrite)
        _sync(path.parent)
    except FileExistsError:
        raise ValueError(_taken(path)) from None
    except OSError as error:
        text = f"cannot write {path} ({len(data):,} bytes): {error.strerror}"
        raise StoreError(f"{text} -> make room or choose another --out; what the store keeps is not lost") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _pattern(out: str | None) -> tuple[Path, tuple[str, ...]]:
    """The folder that `out` names, and the parts below it that may hold fields; the last is the file's name."""
    if out is None:
        return Path(), (DEFAULT,)
    bad = next((c for c in out if unicodedata.category(c) in ("Cc", "Cs")), None)
    if bad is not None or not out:
        raise ValueError(f"--out is {'empty' if bad is None else 'no name for a file'}: {shown(out)}")
    if out.endswith(("/", os.sep)) or os.path.isdir(out):
        return Path(out), (DEFAULT,)
    parts = Path(out).parts
    at = next((i for i, part in enumerate(parts) if re.search("{.*}", part)), len(parts) - 1)
    if ".." in parts[at:]:
        raise ValueError(f"--out {shown(out)} leaves its folder behind a field -> write .. before the first field")
    if not parts[-1].lower().endswith(".png"):
        raise ValueError(f"--out {shown(out)} must end in .png, or in / for a folder")
    return Path(*parts[:at]), parts[at:]


def _fill(part: str, fields: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            close = get_close_matches(match[1], FIELDS, 1)
            hint = f"did you mean {{{close[0]}}}?" if close else "there are " + " ".join(f"{{{f}}}" for f in FIELDS)
            raise ValueError(f"--out has the unknown field {shown(match[0])}: {hint}")
        return fields[match[1]]

    return re.sub(r"\{([^{}]*)\}", value, part)


def _check(path: Path, root: Path, overwrite: bool) -> None:
    longest = max(path.parts, key=lambda part: len(part.encode()))
    if len(longest.encode()) > NAME:
        raise ValueError(f"--out has a name of {len(longest.encode())} bytes; the limit is {NAME}: {shown(longest)}")
    home, folder = os.path.realpath(root), os.path.realpath(path.parent)
    if os.path.commonpath((home, folder)) != home:
        raise ValueError(f"{path.parent} leads out of {root} by a symlink -> remove the symlink or name {folder}")
    if os.path.lexists(path) and (not overwrite or (os.path.isdir(path) and not path.is_symlink())):
        raise ValueError(_taken(path))
    there = next(parent for parent in (Path(folder), *Path(folder).parents) if os.path.exists(parent))
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder -> choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write in {there} -> choose another --out")


def _taken(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder -> write {path}/ to put pictures inside"
    return f"{path} is there already -> --overwrite, or another --out"


def _publish(part: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, path)
        return
    try:
        os.link(part, path)
    except OSError as error:
        # exFAT and many network mounts have no hard links, the one rename that never replaces.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.rename(part, path)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
