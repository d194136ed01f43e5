"""Models of the Hugging Face hub: what is in its cache, and how the missing part comes."""

import difflib
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import huggingface_hub.constants as settings

from stages.errors import ModelError
from stages.models import remote_headers
from stages.models.files import (
    LARGEST_CONFIG,
    LARGEST_SMALL,
    Incomplete,
    OutOfReach,
    hub_id,
    is_hidden,
    is_small,
    opened_first,
    weight_files,
)
from stages.models.hub_answers import answers, bounded
from stages.models.index import INDEX, MODULAR

MOST_ENTRIES = 100_000

# Bytes of the files that a run needs, to tell what a download takes where the hub cannot be asked.
DOWNLOADS = {"black-forest-labs/FLUX.1-dev": 33_740_000_000, "black-forest-labs/FLUX.1-schnell": 33_730_000_000}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_id(model: str) -> bool:
    """Whether it can be the id of a hub model, such as `black-forest-labs/FLUX.1-dev`."""
    return bool(_ID.fullmatch(model)) and ".." not in model and "--" not in model


def download_line(root: Path, names: Iterable[str]) -> str:
    """The shell line that downloads components into a model folder."""
    wanted = " ".join(f"--include {shlex.quote(f'{name}/*')}" for name in names)
    model = hub_id(root)
    if model is not None:
        return f"hf download {model} --revision {root.name} {wanted}"
    return f"hf download ID {wanted} --local-dir {shlex.quote(str(root))}"


def cached(model: str, revision: str | None) -> Path | None:
    """The snapshot folder in the cache, whole or not; None when there is none. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX, MODULAR):
        path = try_to_load_from_cache(model, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def fetch_index(model: str, revision: str | None) -> Path:
    """The model's snapshot folder, with its index downloaded: so the model is there, and open to us."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    there = answers()
    with _explained(model, revision, largest=LARGEST_CONFIG):
        for name in (INDEX, MODULAR):
            try:
                return Path(hf_hub_download(model, name, revision=revision, local_files_only=not there)).parent
            except RemoteEntryNotFoundError:
                continue
    raise ModelError(f"{model} has no {INDEX}, so it is no model in the diffusers layout; give the id of one that has")


def fetch_small(model: str, root: Path, names: Collection[str], libraries: Mapping[str, str]) -> dict[str, int]:
    """Downloads all but the weights of the components `names`; gives the bytes of every file of the model.

    `libraries` has the library of those that have weights. Raises ModelError when theirs are not safetensors.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _explained(model, root.name):
        if not answers():
            raise LocalEntryNotFoundError("the hub does not answer")
        sizes = _listed(model, root.name)
    small = []
    for name in names:
        files = _inside(model, name, sizes)
        if name in libraries:
            opened_first(Path(model, name), libraries[name], files)
        small += [f"{name}/{file}" for file in files if is_small(file)]
    if large := [path for path in small if sizes[path] > LARGEST_SMALL]:
        raise ModelError(f"{model} says that {large[0]} has {sizes[large[0]]} bytes, more than the {LARGEST_SMALL} "
                         f"that a file beside the weights may have: refused; use a model that is whole")
    _fetch(model, root, {path: sizes[path] for path in small})
    return sizes


def _listed(model: str, revision: str | None) -> dict[str, int]:
    """The bytes of every file of a model, as the hub lists them."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = list(islice(HfApi().list_repo_tree(model, revision=revision, recursive=True), MOST_ENTRIES + 1))
    sizes = {str(item.path): int(item.size) for item in tree if isinstance(item, RepoFile)}
    if len(tree) > MOST_ENTRIES or min(sizes.values(), default=0) < 0:
        raise ModelError(f"{model} lists more than {MOST_ENTRIES} files, or some of less than 0 bytes: refused; use a "
                         f"model that is whole")
    return sizes


def fetch_weights(model: str, root: Path, libraries: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Downloads the safetensors of components, if the disk has room; their configs are there already."""
    wanted = {path: sizes[path] for path in _weight_paths(model, root, libraries, sizes)}
    _check_disk(model, root, wanted)
    _fetch(model, root, wanted)


def fetch_headers(model: str, root: Path, libraries: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Reads the headers of the safetensors of components that are not there; their configs are there already."""
    absent = [path for path in _weight_paths(model, root, libraries, sizes) if not (root / path).exists()]
    with _explained(model, root.name):
        remote_headers.fetch(model, root.name, absent, sizes)


def _weight_paths(model: str, root: Path, libraries: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    """The paths of the safetensors of components; ModelError for one that the model lacks."""
    paths = []
    for name, library in libraries.items():
        first = opened_first(root / name, library, _inside(model, name, sizes))
        files = [first] if not first.endswith(".json") else [path.name for path in weight_files(root / name, library)]
        paths += [f"{name}/{file}" for file in files]
    if absent := [path for path in paths if path not in sizes]:
        raise ModelError(f"{model} has no {absent[0]}, though its index names it: the model itself is incomplete")
    return paths


def _inside(model: str, name: str, paths: Iterable[str]) -> list[str]:
    found = [path.removeprefix(f"{name}/") for path in paths if path.startswith(f"{name}/")]
    files = [file for file in found if "/" not in file and not is_hidden(file)]
    if not files:
        raise ModelError(f"{model} has no folder {name}, though its index names it: the model itself is incomplete")
    if code := [file for file in files if file.endswith(".py")]:
        raise ModelError(
            f"{model} has custom code ({name}/{code[0]}): refused; use a model of the libraries' own classes"
        )
    return files


def _check_disk(model: str, root: Path, sizes: Mapping[str, int]) -> None:
    begun = sum(path.stat().st_size for path in (root.parent.parent / "blobs").glob("*.incomplete"))
    needed = sum(size for path, size in sizes.items() if not (root / path).exists()) - begun
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ModelError(
            f"{model} still needs {needed} bytes ({needed / 1e9:.1f} GB) on the disk of {settings.HF_HUB_CACHE}, "
            f"which has {free} free ({free / 1e9:.1f} GB): free {(needed - free) / 1e9:.1f} GB (hf cache prune), or "
            f"set HF_HOME to a folder on a larger disk"
        )


def _fetch(model: str, root: Path, sizes: Mapping[str, int]) -> None:
    """Downloads the files of these sizes that are not there."""
    from huggingface_hub import snapshot_download

    absent = {path: size for path, size in sizes.items() if not (root / path).exists()}
    wanted = [re.sub(r"([*?[])", r"[\1]", path) for path in absent]
    if wanted:
        with _explained(model, root.name, largest=max(absent.values())):
            snapshot_download(model, revision=root.name, allow_patterns=wanted)


def list_files(model: str) -> list[str]:
    """The names of the files of a model, or where the hub cannot be asked, of those in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError):
        if settings.HF_HUB_OFFLINE:
            root = Path(snapshot_download(model, local_files_only=True))
            return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    with _explained(model, None, "*.safetensors"):
        if not answers():
            raise LocalEntryNotFoundError("the hub does not answer")
        return list(_listed(model, None))


def fetch_file(model: str, name: str) -> Path:
    """One file of a model, downloaded unless it is in the cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    there, largest = answers(), None
    try:
        with _explained(model, None, name):
            if there and name not in (sizes := _listed(model, None)):
                raise ModelError(f"{model} has no file {name}; its files: {', '.join(list(sizes)[:9])}")
            largest = sizes[name] if there else None
    except OutOfReach:
        if isinstance(kept := try_to_load_from_cache(model, name), str):
            return Path(kept)
        raise
    with _explained(model, None, name, largest):
        return Path(hf_hub_download(model, name, local_files_only=not there))


def fetch_beside(model: str, path: Path) -> None:
    """Downloads the file that would be at `path` in a snapshot of a model, if the model has it.

    Where the hub cannot be asked, what is in the cache is all that can be known.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    root = next(parent for parent in path.parents if parent.parent.name == "snapshots")
    name = path.relative_to(root).as_posix()
    with _explained(model, root.name, name, LARGEST_CONFIG), suppress(RemoteEntryNotFoundError):
        # Where it is there, or was not, is known in the cache.
        if try_to_load_from_cache(model, name, revision=root.name) is None and answers():
            hf_hub_download(model, name, revision=root.name)


def refuse_offline(model: str, revision: str | None, missing: Incomplete) -> None:
    """Raises ModelError about a half cached model when HF_HUB_OFFLINE forbids to fetch the rest."""
    if settings.HF_HUB_OFFLINE:
        raise OutOfReach(f"{model} is in the cache only in part ({missing}), and HF_HUB_OFFLINE is set; "
                         f"{_download_advice(model, revision)}") from missing


@contextmanager
def _explained(
    model: str, revision: str | None, file: str | None = None, largest: int | None = None
) -> Iterator[None]:
    """What the hub refuses, as one ModelError with the next step: of a whole model, or of a `file` of it.

    `largest` are the bytes of the largest file that is downloaded, where that is known.
    """
    from huggingface_hub import errors

    commit = revision if revision is not None and _COMMIT.fullmatch(revision) else None
    try:
        with bounded(model, commit, largest):
            yield
    except errors.GatedRepoError as error:
        raise OutOfReach(_gated(model)) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{model} has no revision {revision}; choose one of "
                         f"https://huggingface.co/{model}/commits/main, or leave `revision` out") from error
    except errors.RepositoryNotFoundError as error:
        raise OutOfReach(f"the hub knows no model {model}{_nearest(model)}, or it is private: check the spelling at "
                         f"https://huggingface.co/{model}, and for a private model: {_token()}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if settings.HF_HUB_OFFLINE else f"{settings.ENDPOINT} cannot be reached"
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            why = _answered(model, error.__cause__.response.status_code)
        what, near = (model, _nearest(model)) if file is None else (f"{model}/{file}", "")
        advice = _download_advice(model, revision, file)
        raise OutOfReach(f"{what} is not in the cache{near} and {why}; {advice}") from error
    except errors.HfHubHTTPError as error:
        raise OutOfReach(_answered(model, error.response.status_code)) from error
    except errors.HTTPError as error:  # the HTTP library's own, which differs between versions of the hub's
        raise _broken(error) from error
    except (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{settings.ENDPOINT} answered with something else than asked for {model} "
                         f"({type(error).__name__}: {error!s:.200}); use another hub") from error
    except (OSError, RuntimeError) as error:  # what Xet says of its connection; what the system says has a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _broken(error) from error


def _broken(error: BaseException) -> OutOfReach:
    return OutOfReach(f"the connection to {settings.ENDPOINT} broke ({type(error).__name__}); run the same "
                      f"again: what has arrived is kept")


def _answered(model: str, status: int) -> str:
    if status == 401:
        return f"the hub refused the token for {model} (401): run `hf auth login` with a valid one; {_token()}"
    return f"the hub answered {status} for {model}: try again later"


def _gated(model: str) -> str:
    return (
        f"{model} is gated: 1. accept its license at https://huggingface.co/{model} with your account, "
        f"2. run `hf auth login` with a token of that account; {_token()}"
    )


def _token() -> str:
    from huggingface_hub import get_token

    places = f"HF_TOKEN, the file {settings.HF_TOKEN_PATH}"
    found = f"a token was found ({places}) but it gives no access" if get_token() else f"no token was found ({places})"
    return f"{found}; on Kaggle or Colab add a secret named HF_TOKEN"


def _download_advice(model: str, revision: str | None, file: str | None = None) -> str:
    # Last comes the command, to be pasted as it is.
    if file is not None:
        return f"where there is a network, run: hf download {model} --include {shlex.quote(file)}"
    size = f" ({DOWNLOADS[model] / 1e9:.1f} GB)" if model in DOWNLOADS else ""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    return f"where there is a network{size}, run: hf download {model}{at} --include model_index.json --include '*/*'"


def no_folder_error(model: str, folder: Path) -> ModelError:
    """The error for a path that is not there, or is no folder, with what is nearest to it."""
    if folder.exists():
        return ModelError(f"{model} is a file; give a folder with model_index.json, or a hub id")
    return ModelError(f"no model at {model}{_nearest(model)}; give a folder with model_index.json, or a hub id such "
                      f"as black-forest-labs/FLUX.1-dev")


def _nearest(model: str) -> str:
    folder = Path(model).expanduser()
    folders = [str(folder.parent / name) for name in _near(folder.name, _folders(folder.parent))]
    cached = _near(model, cached_ids())
    hints = [f"{kind}: {', '.join(names)}" for kind, names in (("nearest folder", folders), ("in the cache", cached))
             if names]
    return f" ({'; '.join(hints)})" if hints else ""


def cached_ids() -> list[str]:
    """The ids of the models in the hub's cache."""
    return [
        name.removeprefix("models--").replace("--", "/")
        for name in _folders(Path(settings.HF_HUB_CACHE)) if name.startswith("models--")
    ]


def _folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _near(name: str, names: list[str]) -> list[str]:
    lower = {other.lower(): other for other in names}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
