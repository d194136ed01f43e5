"""A store behind a URL, through fsspec: the same bytes, order and checks as in a folder, without locks and fsync.

Object stores show a file whole or not at all. Elsewhere it is written aside and moved, which is as atomic as the
backend's move. Two machines that compute the same artifact write the same bytes, and the last one stays.
"""

import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

from runner.artifacts.atomic_files import TMP, Entry, File
from runner.artifacts.manifest import checked_key
from runner.artifacts.signed_json import MAX_DOCUMENT_BYTES, Damaged, read_document, write_document
from runner.artifacts.store import Store, Warn
from runner.artifacts.temp_files import PART
from stages.errors import StoreError

MARK = "store.json"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs",
            "az": "adlfs", "oci": "ocifs", "oss": "ossfs", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol"}
# Where a file that is being written is not seen before it is whole.
WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"})
AT_ONCE = 256
_TIMES = ("LastModified", "mtime", "updated", "last_modified", "created")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(?P<rest>[^\0-\x1f\x7f]*)")


class RemoteStore(Store):
    """A store behind a URL such as s3://bucket/folder; StoreError at once where it cannot be reached."""

    def __init__(
        self, url: str, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False
    ) -> None:
        super().__init__(warn, strict)
        self.url = checked_url(url)
        self._files, self._root = _filesystem(self.url)
        protocols = self._files.protocol
        self._whole = not WHOLE.isdisjoint((protocols,) if isinstance(protocols, str) else protocols)
        self._check_ours(readonly)

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"
    @property
    def where(self) -> str:
        return self.url

    def fetch(self, path: str, max_bytes: int, *, first: int | None = None) -> bytearray | None:
        return next(self.fetch_all([path], max_bytes, first=first))

    def fetch_all(
        self, paths: Sequence[str], max_bytes: int, *, first: int | None = None
    ) -> Iterator[bytearray | None]:
        # One byte more, to see what is too long without asking for its size first.
        end = max_bytes + 1 if first is None else first
        for start in range(0, len(paths), AT_ONCE):
            some = paths[start : start + AT_ONCE]
            with self._explained("read", some[0]):
                found = self._files.cat_ranges([f"{self._root}/{path}" for path in some], 0, end, on_error="return")
            for path, data in zip(some, found, strict=True):
                yield self._checked(path, data, max_bytes)

    def publish(self, files: Sequence[File]) -> None:
        for file in files:
            path = file.path()
            with self._explained("write", path):
                data = b"".join(file.chunks())
                if self._whole:
                    self._files.pipe_file(f"{self._root}/{path}", data)
                else:
                    self._move_in(path, data)

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            with self._explained("remove", path):
                try:
                    self._files.rm_file(f"{self._root}/{path}")
                except FileNotFoundError:
                    continue

    def names(self, folder: str) -> list[str]:
        full = f"{self._root}/{folder}"
        with self._explained("list", folder):
            try:
                found = self._files.ls(full, detail=False)
            except FileNotFoundError:
                return []
        # Some backends list the folder itself as well.
        inside = (path.rstrip("/") for path in found)
        return sorted({path.rpartition("/")[2] for path in inside if not path.endswith(full)})

    def entries(self, folder: str) -> Iterator[Entry]:
        """Every file below a folder; one whose time the backend does not tell is taken for new."""
        with self._explained("list", folder):
            found = self._files.find(f"{self._root}/{folder}", detail=True)
        for path, facts in sorted(found.items()):
            inside = path[path.index(f"{self._root}/{folder}/") + len(self._root) + 1 :]
            yield Entry(inside, int(facts["size"] or 0), _modified(facts))

    def working(self, key: str) -> AbstractContextManager[None]:
        """No lock: two machines that compute the same at once both do, and both are right."""
        checked_key(key)
        return nullcontext()

    def sweep(self, *, min_age: float, dry_run: bool) -> list[Entry]:
        found = [entry for entry in self.entries(TMP) if entry.path.endswith(PART) and entry.age() >= min_age]
        if not dry_run:
            self.remove([entry.path for entry in found])
        return found

    def _move_in(self, path: str, data: bytes) -> None:
        part, target = f"{self._root}/{TMP}/{secrets.token_hex(8)}{PART}", f"{self._root}/{path}"
        self._files.makedirs(part.rpartition("/")[0], exist_ok=True)
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(part, data)
        self._files.mv(part, target)

    def _checked(self, path: str, data: "bytes | Exception", max_bytes: int) -> bytearray | None:
        if isinstance(data, FileNotFoundError):
            return None
        with self._explained("read", path):
            if isinstance(data, Exception):
                # There is no first byte to ask an empty file for.
                if self._files.info(f"{self._root}/{path}")["size"] != 0:
                    raise data
                return bytearray()
        if len(data) > max_bytes:
            raise StoreError(f"{self.url}/{path} has more than the {max_bytes:,} bytes that are read: remove it")
        return bytearray(data)

    def _check_ours(self, readonly: bool) -> None:
        mark = self.fetch(MARK, MAX_DOCUMENT_BYTES)
        if mark is not None:
            try:
                read_document(mark)
            except Damaged as error:
                raise StoreError(f"{self.url}/{MARK}: {error}: remove it") from error
        elif not readonly:
            # Also finds out at once whether we may write, and whether there is such a bucket.
            self.publish([File.of(MARK, write_document({"store": "stagerun"}))])
        elif not self.names("runs") and not self.names("stages"):
            raise StoreError(f"there is no artifact store {self.url}")

    @contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        """Turns an error of the backend into a StoreError with the URL, the cause and the next step."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # the libraries behind fsspec have errors of their own, which nothing lists
            text = f"{type(error).__name__}: {str(error).strip() or 'no more is said'}"[:300]
            raise StoreError(
                f"cannot {verb} {self.url}/{path}: {text} -> check credentials, bucket and connection, or choose "
                f"another `store`"
            ) from error


def checked_url(url: str) -> str:
    """The URL without a slash at its end; StoreError where it could not be that of a store, or tells a password."""
    match = _URL.fullmatch(url)
    rest = "" if match is None else match["rest"].rstrip("/")
    scheme = url.partition("://")[0][:20]
    if match is None or "::" in url or ".." in rest.split("/"):
        raise StoreError(f"`store` {scheme!r}://... is no address of a store -> such as s3://bucket/folder")
    if "@" in rest.partition("/")[0]:
        raise StoreError(
            f"`store` {scheme}://...@...: an address is shown and recorded, so it must not hold a user or a "
            f"password -> keep them where the library of {scheme}:// looks for them"
        )
    if not rest and scheme != "memory":
        raise StoreError(f"`store` {scheme}:// names no bucket -> {scheme}://bucket/folder")
    return f"{scheme}://{rest}"


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path of the store in it."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        # A listing that is kept would hide what other machines write.
        files, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES.get(scheme, "fsspec")
        raise StoreError(f"`store` {url} needs a package: {error} -> pip install {package}") from error
    except ValueError as error:
        raise StoreError(f"`store` {url}: {error} -> a folder, memory, s3://... or gs://...") from error
    except Exception as error:  # some connect at once, and have errors of their own, which nothing lists
        raise StoreError(f"`store` {url} cannot be opened: {type(error).__name__}: {str(error)[:200]} -> check the "
                         f"address, credentials and connection, or choose another `store`") from error
    return files, path.rstrip("/")


def _modified(facts: Mapping[str, Any]) -> float:
    """When a file was written, in whichever of its ways a backend tells it."""
    found = next((facts[name] for name in _TIMES if facts.get(name) is not None), None)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        return found.timestamp()
    return float(found) if isinstance(found, int | float) else time.time()
