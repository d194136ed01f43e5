"""One file of a model folder, read with distrust: the folder may be half downloaded, damaged or hostile."""

import shlex
from pathlib import Path

from stages.errors import ModelError
from stages.strict_json import strict_json

SMALL = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
JSON_CAP = 100 * 2**20
_LFS = b"version https://git-lfs"
_CACHE = "models--"


class Incomplete(ModelError):
    """A file or folder that is simply not there: for a model of the hub, downloading it is the answer."""


def size_of(path: Path) -> int:
    """Bytes of a regular file; ModelError when it is missing, empty, unreadable or a Git LFS pointer."""
    if not path.exists():
        why = "is a link that leads nowhere (a loop, or its file is gone)" if path.is_symlink() else "is missing"
        raise Incomplete(f"{path} {why}; fetch it: {refetch(path)}")
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file; fetch it: {refetch(path)}")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path} has 0 bytes; fetch it again: {refetch(path)}")
    if size < 1024 and head(path, len(_LFS)) == _LFS:
        raise ModelError(
            f"{path} has {size} bytes: it is a Git LFS pointer to {_promised(path)}, not the file itself; "
            f"fetch it: {refetch(path)} (or run: git lfs pull)"
        )
    return size


def head(path: Path, count: int, start: int = 0) -> bytes:
    """At most `count` bytes from `start`; ModelError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the permissions and the disk") from error


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file; ModelError when it is no strict JSON or no object."""
    size = size_of(path)
    if size > JSON_CAP:
        raise ModelError(f"{path} has {size} bytes, more than the {JSON_CAP} that a JSON file may have here")
    return parse_json(head(path, size), path)


def parse_json(text: bytes, path: Path) -> dict[str, object]:
    """A JSON object without duplicate keys and without NaN; ModelError that names `path` otherwise."""
    try:
        found = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again: {refetch(path)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a JSON {type(found).__name__}, not an object; fetch it again: {refetch(path)}")
    return found


def hub_id(root: Path) -> str | None:
    """The hub id of a snapshot folder in the hub's cache; None for any other folder."""
    repo = root.parent.parent.name
    if root.parent.name != "snapshots" or not repo.startswith(_CACHE):
        return None
    return repo.removeprefix(_CACHE).replace("--", "/")


def refetch(path: Path) -> str:
    """The shell line that downloads `<root>/<component>/<file>` (or `<root>/<file>`) again."""
    on_top = path.name.endswith("model_index.json") or hub_id(path.parent) is not None
    root = path.parent if on_top else path.parent.parent
    name = shlex.quote(path.relative_to(root).as_posix())
    model = hub_id(root)
    if model is not None:
        return f"hf download {model} {name} --revision {root.name} --force-download"
    return f"hf download ID {name} --local-dir {shlex.quote(str(root))} --force-download"


def _promised(path: Path) -> str:
    lines = head(path, 1024).decode("ascii", "replace").split("\n")
    sizes = [line.removeprefix("size ") for line in lines if line.startswith("size ")]
    return f"{sizes[0]} bytes" if sizes and sizes[0].isdigit() else "the real file"
