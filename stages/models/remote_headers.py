"""Weights of a hub model that are not here: the headers of their files, read by range and kept. No weights come."""

import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile

import huggingface_hub.constants as settings

from stages.errors import ModelError
from stages.models.files import HEADER_ONLY

CONNECTIONS = 8
# Bytes of spaces that a header may have besides.
SPARE = 2**20


def header_folder(model: str, revision: str) -> Path:
    """The folder for the headers of a model at a commit, laid out like the model."""
    # As `cached_assets_path` has it, which makes the folder: a cache may be read-only, and nothing is missing.
    return Path(settings.HF_ASSETS_CACHE, "stagerun", model.replace("/", "--"), revision)


def fetch(model: str, revision: str, paths: Collection[str], sizes: Mapping[str, int]) -> None:
    """Read and keep the headers of the files `paths`, whose bytes are in `sizes`, unless they are kept already.

    Raises ModelError for a file that is no safetensors file of this size, and what the hub's client raises.
    """
    folder = header_folder(model, revision)
    missing = [path for path in paths if not (folder / f"{path}{HEADER_ONLY}").exists()]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for path, header in zip(missing, pool.map(lambda path: _read(model, revision, path, sizes[path]), missing),
                                strict=True):
            _write(folder / f"{path}{HEADER_ONLY}", header)


def _read(model: str, revision: str, path: str, size: int) -> bytes:
    """The beginning of a safetensors file of `size` bytes, up to its data."""
    from huggingface_hub import parse_safetensors_file_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        found = parse_safetensors_file_metadata(model, path, revision=revision)
    except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
        raise ModelError(f"{path} of {model} is no safetensors file ({error}); use a model that is whole") from error
    table = {name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
             for name, info in found.tensors.items()}
    data = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # As long as the one in the file, which says more: so the data stand where they do there.
    length = size - data - 8
    if not len(text) <= length <= 2 * len(text) + len(json.dumps(found.metadata)) + SPARE:
        raise ModelError(f"{path} of {model} has {size} bytes, but its header tells of {data + len(text) + 8}: the "
                         f"model itself is not whole; use one that is")
    return length.to_bytes(8, "little") + text.ljust(length)


def _write(path: Path, header: bytes) -> None:
    """Write a file that is whole from the moment on at which it is there, whoever else reads or writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
