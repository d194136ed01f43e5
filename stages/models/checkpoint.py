"""A model on disk: found, complete and of the right kind, before anything heavy is imported or loaded."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.errors import InvalidInput, ModelError
from stages.families import FAMILIES, Family, is_unsupported
from stages.models import hub, remote_headers
from stages.models.config_check import check_scheduler, check_tokenizer
from stages.models.files import (
    HEADER_ONLY,
    Incomplete,
    OutOfReach,
    add_to,
    head,
    is_small,
    read_json,
    visible,
    weight_files,
)
from stages.models.foreign_code import refuse_code, refuse_fields
from stages.models.format import refuse_companions, refuse_quantized
from stages.models.index import BLOCKS, INDEX, MODULAR, Index, read_index
from stages.models.lora import Lora
from stages.models.safetensors_header import file_bytes, read_header
from stages.models.scheduler import SchedulerRequest
from stages.models.shapes import HEADERS, laid_out, shipped
from stages.wording import with_article

# Files of so many bytes are told apart by size, time and header: to hash all of a model takes minutes.
LARGE = 64 * 2**20
_WEIGHTLESS = re.compile(r"(Tokenizer|TokenizerFast|Processor|ProcessorFast|FeatureExtractor|Scheduler)$")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tekken.json",))


@dataclass(frozen=True)
class Component:
    """One part of a model, such as its VAE, or the tokenizer of one of its text encoders."""

    name: str
    """The name that the model's index has for it."""
    library: str
    """`diffusers` or `transformers`."""
    class_name: str
    """The library's class that reads it."""
    folder: Path
    """Its folder in the model's."""
    files: tuple[Path, ...]
    """Its safetensors files; none where it has no weights."""
    loras: tuple[Lora, ...] = ()
    """What is merged into the weights when they are read."""

    @property
    def bytes(self) -> int:
        """Bytes of the safetensors files, wherever they are."""
        return sum(map(file_bytes, self.files))

    @property
    def bytes_to_download(self) -> int:
        """Bytes of the safetensors files that are not here."""
        return sum(file_bytes(path) for path in self.files if path.suffix == HEADER_ONLY)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was checked."""

    path: Path
    """The folder; of a model of the hub, the snapshot in the cache."""
    source: str
    """How the model was asked for."""
    identity: str
    """What names its content, and goes into the keys of artifacts: hub id and commit, or a hash."""
    pipeline: str
    """The name of its pipeline class."""
    components: Mapping[str, Component]
    """Its parts by name."""
    absent: Collection[str] = ()
    """The names of parts that its index says it does without."""
    loras: Mapping[Lora, Collection[str]] = field(default_factory=dict)
    """What is merged into it, with the names of the components that each LoRA adds to."""
    scheduler: SchedulerRequest | None = None
    """What takes the place of its own scheduler."""
    unscheduled: str = ""
    """What names its content but for its schedulers, which no stage before the denoise reads; empty: its identity."""
    shapes: str = ""
    """Of which shapes it is known, where no file of the model was read; empty where its own files were."""
    unread: str = ""
    """Why no file of it was read, where none was."""

    @property
    def bytes_to_download(self) -> int:
        """Bytes of the weights that are not here: to be downloaded before anything is loaded."""
        return sum(component.bytes_to_download for component in self.components.values())

    @property
    def bytes_elsewhere(self) -> int:
        """Bytes of the weights that another machine has to download: all of a model of the hub."""
        whole = sum(component.bytes for component in self.components.values())
        return whole if self.identity.startswith(f"{self.source}@") else self.bytes_to_download

    def with_loras(self, loras: Mapping[Lora, Collection[str]]) -> "Checkpoint":
        """The same checkpoint with LoRAs, each for the components that it adds to."""
        components = {
            name: replace(component, loras=tuple(lora for lora, names in loras.items() if name in names))
            for name, component in self.components.items()
        }
        return replace(self, components=components, loras=loras)


def find(
    model: str | Path, *, revision: str | None = None, components: Collection[str] | None = None, weights: bool = True
) -> Checkpoint:
    """The model as a checked local folder; from the hub, only what `components` need is downloaded.

    `components` defaults to all that the model has; `()` reads nothing but the index: enough for `check_family`.
    Without `weights` no more of them is read than the headers: enough to weigh and to plan. Raises ModelError when
    the model is not found, not complete, damaged, or would run code of its own, and InvalidInput for a revision of a
    folder.
    """
    with _looked_at():
        return _find(model, revision, components, weights)


def _find(model: str | Path, revision: str | None, components: Collection[str] | None, weights: bool) -> Checkpoint:
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:  # a ~ that is nobody's
        raise ModelError(f"no model at {model} ({error}); give a folder with {INDEX}, or a hub id") from error
    if isinstance(model, str) and not folder.exists() and hub.is_id(model):
        return _find_on_hub(model, revision, components, weights)
    if revision is not None:
        raise InvalidInput(f"`revision={revision}` is for models of the hub, but {model} is a folder; leave it out")
    if not folder.is_dir():
        raise hub.no_folder_error(str(model), folder)
    return _checked(folder.resolve(), str(model), None, components)


def find_shapes(model: str) -> Checkpoint | None:
    """The model as far as the shapes that ship with the package tell: enough to plan; None where none ship."""
    shapes = shipped(model)
    if shapes is None:
        return None
    with _looked_at():
        folder = laid_out(shapes)
        found = _checked(folder, model, f"{model}@shapes", None, folder / HEADERS)
    return replace(found, shapes=str(shapes))


@contextmanager
def _looked_at() -> Iterator[None]:
    """What the system refuses of a folder or a file, as ModelError."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or 'the model'} cannot be looked at ({error.strerror or error}); check the "
                         f"permissions of all folders on the way, and the disk") from error


def check_family(checkpoint: Checkpoint, *, family: Family) -> None:
    """ModelError when the checkpoint is not of the family, naming both and what would work."""
    if checkpoint.pipeline.replace("ModularPipeline", "Pipeline") == family.pipeline:
        return
    fitting = [other.name for other in FAMILIES.values() if other.pipeline == checkpoint.pipeline]
    step = f"run the family {fitting[0]} instead, or" if fitting else "no family here runs it;"
    raise ModelError(
        f"{checkpoint.source} is {with_article(checkpoint.pipeline)}, but family {family.name} runs "
        f"{with_article(family.pipeline)}; {step} give {with_article(family.pipeline)} model, such as "
        f"`model={family.repo}`"
    )


def _weightless(class_name: str) -> bool:
    """Whether a class of the index is a tokenizer, a processor or a scheduler: something without weights."""
    return _WEIGHTLESS.search(class_name) is not None


def _find_on_hub(
    model: str, revision: str | None, components: Collection[str] | None, weights: bool
) -> Checkpoint:
    cached = hub.cached(model, revision)
    if cached is not None:
        headers = None if weights else remote_headers.header_folder(model, cached.name)
        try:
            return _checked(cached, model, f"{model}@{cached.name}", components, headers)
        except Incomplete as missing:
            hub.refuse_offline(model, revision, missing)
    try:
        root = hub.fetch_index(model, revision)
    except OutOfReach as error:
        # Whoever got in would meet a model that nothing here runs.
        if is_unsupported(model):
            raise ModelError(f"{model} is not supported -> choose from {', '.join(FAMILIES)}, or another model of one "
                             f"of these") from error
        raise
    index = read_index(root, model)
    names = _chosen(index, model, components)
    classes = {name: index.part(name) for name in names}
    libraries = {name: library for name, (library, class_name) in classes.items() if not _weightless(class_name)}
    sizes = hub.fetch_small(model, root, names, libraries)
    for name in names:
        refuse_code(root / name)
    if weights:
        hub.fetch_weights(model, root, libraries, sizes)
    else:
        hub.fetch_headers(model, root, libraries, sizes)
    headers = None if weights else remote_headers.header_folder(model, root.name)
    return _checked(root, model, f"{model}@{root.name}", components, headers)


def _checked(
    root: Path, source: str, identity: str | None, names: Collection[str] | None, headers: Path | None = None
) -> Checkpoint:
    """The checked folder; weights that are not there are represented by what is in the folder `headers`."""
    index = read_index(root, source)
    if (blocks := root / BLOCKS).exists():
        refuse_fields(read_json(blocks), blocks)
    components = {name: _component(root, name, index, headers) for name in _chosen(index, source, names)}
    whole, unscheduled = (identity, identity) if identity else _fingerprints(root, index)
    return Checkpoint(root, source, whole, index.pipeline, components, index.absent, unscheduled=unscheduled)


def _chosen(index: Index, source: str, names: Collection[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(index.parts)
    for name in names:
        if name not in index.parts:
            raise ModelError(f"{source} has no component {name}; it has {', '.join(index.parts)}")
    return tuple(name for name in index.parts if name in names)


def _component(root: Path, name: str, index: Index, headers: Path | None) -> Component:
    (library, class_name), folder = index.part(name), root / name
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
        raise Incomplete(f"{folder} is missing: the index names component {name}, the folder has {there or 'none'}; "
                         f"fetch it: {hub.download_line(root, (name,))}")
    refuse_code(folder)
    if _weightless(class_name):
        _check_small(folder, class_name)
        return Component(name, library, class_name, folder, ())
    refuse_quantized(read_json(folder / "config.json"), folder)
    files = weight_files(folder, library, headers / name if headers else None)
    for path in files:
        refuse_companions(read_header(path), path)
    return Component(name, library, class_name, folder, files)


def _check_small(folder: Path, class_name: str) -> None:
    names = {path.name for path in visible(folder)}
    said = folder / "tokenizer_config.json"
    if said.exists():
        check_tokenizer(read_json(said), said, class_name)
    if class_name.endswith("Scheduler"):
        path = folder / "scheduler_config.json"
        check_scheduler(read_json(path), path)
    elif class_name.endswith(("Tokenizer", "TokenizerFast")) and not (
        any(name.endswith((".model", ".spm", ".tiktoken")) for name in names)
        or any(names.issuperset(vocabulary) for vocabulary in _VOCABULARIES)
    ):
        # transformers makes an empty tokenizer of such a folder, without a word.
        raise Incomplete(f"{folder} has no vocabulary (tokenizer.json, vocab.json with merges.txt, or a .model file); "
                         f"fetch it: {hub.download_line(folder.parent, (folder.name,))}")
    elif not names:
        raise Incomplete(f"{folder} is empty; fetch it: {hub.download_line(folder.parent, (folder.name,))}")


def _fingerprints(root: Path, index: Index) -> tuple[str, str]:
    """Changes when a file changes that a run may read, whichever components were asked for.

    The second one does not change with schedulers: with their folders, and with their classes in the index.
    """
    schedulers = {name for name, (_, class_name) in index.parts.items() if str(class_name).endswith("Scheduler")}
    whole, unscheduled = hashlib.sha256(), hashlib.sha256()
    for path in _files(root, index):
        seen = _file_fingerprint(root, path)
        whole.update(seen)
        if path.parent == root:
            named = {name: value for name, value in read_json(path).items() if name not in schedulers}
            unscheduled.update(json.dumps([path.name, named]).encode())
        elif path.parent.name not in schedulers:
            unscheduled.update(seen)
    return f"sha256:{whole.hexdigest()}", f"sha256:{unscheduled.hexdigest()}"


def _file_fingerprint(root: Path, path: Path) -> bytes:
    status, content = path.stat(), hashlib.sha256()
    name = f"{path.relative_to(root).as_posix()}\0{status.st_size}\0".encode()
    if status.st_size >= LARGE and path.suffix == ".safetensors":
        name += f"{status.st_mtime_ns}\0".encode()
        length = int.from_bytes(head(path, 8), "little")
        add_to(content, path, min(length, LARGE), 8)
    else:
        add_to(content, path, status.st_size)
    return name + content.digest()


def _files(root: Path, index: Index) -> Iterator[Path]:
    yield from (path for path in (root / INDEX, root / MODULAR) if path.is_file())
    for name in sorted(index.parts):
        for path in visible(root / name) if (root / name).is_dir() else ():
            if path.is_file() and (is_small(path.name) or path.suffix == ".safetensors"):
                yield path
