"""LoRA files: which are asked for, and where they are. No torch, and no tensor is read."""

import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stages.errors import InvalidInput, ModelError
from stages.models.files import LARGEST_CONFIG, PICKLES, size_of
from stages.models.safetensors_header import read_header

LARGEST_SCALE = 10.0
# In place of LoRAs: use none, though the picture that is made again had some.
NONE = "none"
SUFFIX = ".safetensors"
# PEFT keeps what the matrices are multiplied by beside them.
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SCALE = re.compile(r"[+-]?([0-9]{1,3}(\.[0-9]{0,9})?|\.[0-9]{1,9})")


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA that is asked for."""

    source: str
    """A file, a folder with one, or one of the hub, such as `user/repo` or `user/repo/file.safetensors`."""
    scale: float = 1.0
    """What it is multiplied by."""
    digest: str | None = None
    """The sha256 that its file must have, where it was used before."""

    def __post_init__(self) -> None:
        if not self.source:
            raise InvalidInput("`loras` names no file -> such as style.safetensors, or style.safetensors=0.8")
        if not (math.isfinite(self.scale) and 0 < abs(self.scale) <= LARGEST_SCALE):
            raise InvalidInput(f"`loras={self.source}`: the scale must be from -{LARGEST_SCALE:g} to "
                               f"{LARGEST_SCALE:g} and not 0, got {self.scale:g}")

    def __str__(self) -> str:
        return f"{self.source} x {self.scale:g}"


@dataclass(frozen=True)
class Lora:
    """A LoRA that is here."""

    path: Path
    """Its file."""
    digest: str
    """The sha256 of the file, with that of the config beside it behind it where there is one."""
    scale: float
    """What it is multiplied by."""
    source: str
    """How it was asked for."""
    pipeline: str
    """The pipeline class of diffusers that it is for."""
    config: Path | None = None
    """PEFT's config beside the file; None where there is none."""


def read_loras(loras: Iterable[str | Path | LoraRequest]) -> tuple[LoraRequest, ...]:
    """The LoRAs that `style.safetensors` and `user/repo=0.8` spell; InvalidInput for a scale that cannot be.

    What follows the last `=` is the scale if it is a number, and part of the name if not.
    """
    if isinstance(loras, str | Path):
        raise InvalidInput(f"`loras` is {str(loras)!r}, which is one -> loras=[{str(loras)!r}]")
    if not isinstance(loras, Iterable):
        raise InvalidInput(f"`loras` is {loras!r} -> give a list")
    loras = list(loras)
    if wrong := [lora for lora in loras if not isinstance(lora, str | os.PathLike | LoraRequest)]:
        raise InvalidInput(f"`loras` has {wrong[0]!r:.80} -> a file, a folder or one of the hub, with its scale "
                           f"behind it: \"style.safetensors=0.8\"")
    return tuple(lora if isinstance(lora, LoraRequest) else _request(str(lora)) for lora in loras)


def _request(text: str) -> LoraRequest:
    source, sign, scale = text.rpartition("=")
    return LoraRequest(source, float(scale)) if sign and _SCALE.fullmatch(scale) else LoraRequest(text)


def find_lora(request: LoraRequest, pipeline: str) -> Lora:
    """The file of a LoRA, downloaded where it is one of the hub; ModelError where there is none or it is another."""
    path = _path(request.source)
    read_header(path)
    config = _config_of(request.source, path)
    digest = _digest_of(path, config)
    if request.digest not in (None, digest):
        raise ModelError(f"{path} has the sha256 {digest[:12]}, and {str(request.digest)[:12]} was used then -> bring "
                         f"that file back, or name the LoRAs with `loras` to make another picture")
    return Lora(path, digest, float(request.scale), request.source, pipeline, config)


def check_source(source: str) -> None:
    """Raise ModelError where no LoRA can be at `source`, as far as that can be said without asking the hub."""
    if _located(source) is None and source.count("/") > 1:
        _check_suffix(source)


def check_unchanged(lora: Lora) -> None:
    """Raise ModelError where the file is another than when it was found: what is made goes by the hash of that one."""
    paths = [lora.path, *([lora.config] if lora.config else [])]
    if not all(path.exists() for path in paths) or _digest_of(lora.path, lora.config) != lora.digest:
        raise ModelError(f"{lora.source} was changed or taken away since the run was planned -> run the same "
                         f"again once it stays as it is")


def _config_of(source: str, path: Path) -> Path | None:
    """PEFT's config beside a file; ModelError for one that is too large to be read, or no file."""
    from stages.models import hub

    beside = path.with_name(ADAPTER_CONFIG)
    if _located(source) is None:
        hub.fetch_beside(_on_hub(source)[0], beside)
    if not beside.exists() and not beside.is_symlink():
        return None
    if (size := size_of(beside)) > LARGEST_CONFIG:
        raise ModelError(f"{beside} has {size} bytes, more than the {LARGEST_CONFIG} that it may have -> use another "
                         f"LoRA")
    return beside


def _digest_of(path: Path, config: Path | None) -> str:
    digest, *others = (_digest(each, each.stat().st_size, each.stat().st_mtime_ns)
                       for each in (path, config) if each is not None)
    return hashlib.sha256((digest + others[0]).encode()).hexdigest() if others else digest


@lru_cache(maxsize=32)
def _digest(path: Path, size: int, modified: int) -> str:
    """The sha256 of a file, for as long as it is as old and as large: several plans ask for the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path(source: str) -> Path:
    from stages.models import hub

    if (here := _located(source)) is not None:
        return here
    repo, name = _on_hub(source)
    if name:
        _check_suffix(source)
    return hub.fetch_file(repo, name or _only(source, hub.list_files(repo)))


def _located(source: str) -> Path | None:
    """The file of this name, or in the folder of this name; None for one of the hub. ModelError for neither."""
    from stages.models import hub

    try:
        if (here := _here(source)) is not None:
            return here
    except (OSError, RuntimeError) as error:  # of a folder or a name, and of a ~ that is nobody's
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{source} cannot be looked at ({why}) -> check its name and the permissions") from error
    repo, name = _on_hub(source)
    if not hub.is_id(repo) or source.startswith((".", "~")) or (source.endswith(SUFFIX) and not name):
        raise ModelError(f"no LoRA at {source} -> give a {SUFFIX} file, a folder with one, or one of the hub such as "
                         f"user/repo or user/repo/file{SUFFIX}")
    return None


def _on_hub(source: str) -> tuple[str, str]:
    """The repository that a source would be of on the hub, and the file in it; "" for the only one."""
    return "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])


def _here(source: str) -> Path | None:
    """The file of this name or in the folder of this name; None where there is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path / _only(source, [file.name for file in path.iterdir()])
    if not path.exists():
        return None
    _check_suffix(source)
    return path.absolute()


def _check_suffix(source: str) -> None:
    """Raise ModelError for a file that diffusers would take for a pickle: for all but one ending."""
    suffix = Path(source).suffix
    if suffix in PICKLES:
        raise ModelError(f"{source}: pickle refused, it can run code; give a LoRA as safetensors")
    if suffix != SUFFIX:
        raise ModelError(f"{source} does not end in {SUFFIX} -> rename it if it is such a file, or give one")


def _only(source: str, names: Iterable[str]) -> str:
    there = sorted(name for name in names if name.endswith(SUFFIX))
    if len(there) != 1:
        what = f"{len(there)} safetensors files: {', '.join(there[:5])}" if there else "no safetensors file"
        raise ModelError(f"{source} has {what} -> name the one to use, such as {source}/"
                         f"{there[0] if there else 'file.safetensors'}")
    return there[0]
