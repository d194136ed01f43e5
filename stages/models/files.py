"""The files of a model folder, read with distrust: the folder may be half downloaded, damaged or hostile."""

import hashlib
import re
import shlex
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from stages.errors import ModelError
from stages.strict_json import strict_json

# The ends of the names of all but weights.
_SMALL = (".json", "vocab.txt", "merges.txt", ".model", ".jinja", ".spm", ".tiktoken")
PIECE = 2**20
LARGEST_SMALL = 100 * 2**20
LARGEST_CONFIG = 16 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Behind the name of a file that holds the header alone, in place of weights that are not here.
HEADER_ONLY = ".header"
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_LFS = b"version https://git-lfs"
_CACHE = "models--"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


class Incomplete(ModelError):
    """A file or folder that is simply not there: for a model of the hub, downloading it is the answer."""


class OutOfReach(ModelError):
    """A model of the hub that cannot be read from here: there is no network, or it is gated, or another's."""


def is_small(name: str) -> bool:
    """Whether a library may read a file of this name besides the weights; notes and licenses it does not."""
    return name.endswith(_SMALL) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether it is the name of what a system keeps beside the files of people, such as `._config.json`."""
    return name.startswith(".")


def visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, without what is hidden."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def check_small(path: Path) -> None:
    """ModelError unless it is a file that may be read whole."""
    if (size := size_of(path)) > LARGEST_SMALL:
        raise ModelError(f"{path} has {size} bytes, more than the {LARGEST_SMALL} that a file beside the weights may "
                         f"have; fetch it again: {refetch_line(path)}")


def size_of(path: Path) -> int:
    """Bytes of a regular file; ModelError when it is missing, empty, unreadable or a Git LFS pointer."""
    if not path.exists():
        why = "is a link that leads nowhere (a loop, or its file is gone)" if path.is_symlink() else "is missing"
        raise Incomplete(f"{path} {why}; fetch it: {refetch_line(path)}")
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file; fetch it: {refetch_line(path)}")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path} has 0 bytes; fetch it again: {refetch_line(path)}")
    if size < 1024 and head(path, len(_LFS)) == _LFS:
        raise ModelError(
            f"{path} has {size} bytes: it is a Git LFS pointer to {_promised(path)}, not the file itself; "
            f"fetch it: {refetch_line(path)} (or run: git lfs pull)"
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


def add_to(digest: "hashlib._Hash", path: Path, count: int, start: int = 0) -> None:
    """Feed a digest with at most `count` bytes of a file from `start`, piece by piece."""
    for at in range(start, start + count, PIECE):
        digest.update(head(path, min(PIECE, start + count - at), at))


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file; ModelError when it is no strict JSON or no object, or too large."""
    size = size_of(path)
    if size > LARGEST_CONFIG:
        raise ModelError(f"{path} has {size} bytes, more than the {LARGEST_CONFIG} that it may have; fetch it again: "
                         f"{refetch_line(path)}")
    try:
        # diffusers writes one in its schedulers' configs: DPM-Solver++ clips lambda at -Infinity by default.
        found = strict_json(head(path, size), infinity=path.name == "scheduler_config.json")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again: {refetch_line(path)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a JSON {type(found).__name__}, not an object; fetch it again: "
                         f"{refetch_line(path)}")
    return found


def hub_id(root: Path) -> str | None:
    """The hub id of a snapshot folder in the hub's cache; None for any other folder."""
    repo = root.parent.parent.name
    if root.parent.name != "snapshots" or not repo.startswith(_CACHE):
        return None
    return repo.removeprefix(_CACHE).replace("--", "/")


def refetch_line(path: Path) -> str:
    """The shell line that downloads `<root>/<component>/<file>` (or `<root>/<file>`) again."""
    on_top = path.name.endswith("model_index.json") or hub_id(path.parent) is not None
    root = path.parent if on_top else path.parent.parent
    name = shlex.quote(path.relative_to(root).as_posix())
    model = hub_id(root)
    if model is not None:
        return f"hf download {model} {name} --revision {root.name} --force-download"
    return f"hf download ID {name} --local-dir {shlex.quote(str(root))} --force-download"


def weight_files(folder: Path, library: str, headers: Path | None = None) -> tuple[Path, ...]:
    """The safetensors files that the library will load from a component folder, in the order of their names.

    Files that are not there are represented by their headers, where there are any in the folder `headers`. Raises
    ModelError when there are only pickles or variants, or when the index names anything but files beside it.
    """
    there = {path.name for path in visible(folder)}
    kept = headers.glob(f"*{HEADER_ONLY}") if headers is not None else ()
    alone = {path.stem: path for path in kept if path.stem not in there}
    name = opened_first(folder, library, there | alone.keys())
    names = _indexed(folder / name) if name.endswith(".json") else [name]
    return tuple(alone.get(name, folder / name) for name in names)


def opened_first(folder: Path, library: str, names: Collection[str]) -> str:
    """The one file that the library opens first, of those in the folder: the weights or their index."""
    single, index = f"{_STEMS[library]}.safetensors", f"{_STEMS[library]}.safetensors.index.json"
    # With both there, diffusers reads the index and transformers the single file.
    for name in (index, single) if library == "diffusers" else (single, index):
        if name in names:
            return name
    if bad := sorted(name for name in names if name.lower().endswith(PICKLES)):
        raise ModelError(
            f"{folder} has no safetensors weights, only {', '.join(bad[:3])}: pickle refused, it can run code; "
            f"use a model that ships safetensors"
        )
    others = sorted(name for name in names if name.endswith((".safetensors", ".gguf")))
    if shards := [name for name in others if name.startswith(f"{_STEMS[library]}-") and _SHARD.search(name)]:
        raise Incomplete(
            f"{folder} has {len(shards)} shards, first {shards[0]}, but not {index}, which says what is in which; "
            f"fetch it: {refetch_line(folder / index)}"
        )
    if others:
        raise ModelError(
            f"{folder} has {', '.join(others[:3])} but no {single}; only the plain variant is read: "
            f"use a model that ships it"
        )
    raise Incomplete(f"{folder} has no weights; fetch them: {refetch_line(folder / single)}")


def _indexed(index: Path) -> list[str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{index} has no weight_map; fetch it again: {refetch_line(index)}")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if name != PurePosixPath(name).name or "\\" in name or ":" in name or "\0" in name:
            raise ModelError(f"{index} names {name!r}, which is not a file beside it: refused; use an untouched copy")
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {name!r}: pickle refused, only safetensors are read; use a model that ships them"
            )
    return names


def _promised(path: Path) -> str:
    lines = head(path, 1024).decode("ascii", "replace").split("\n")
    sizes = [line.removeprefix("size ") for line in lines if line.startswith("size ")]
    return f"{sizes[0]} bytes" if sizes and sizes[0].isdigit() else "the real file"
