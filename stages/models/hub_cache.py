"""The cache of the Hugging Face hub as it lies on this disk: where, which models, how many bytes. Nothing is removed.

Its own command, `hf cache`, removes what it holds.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants as settings


@dataclass(frozen=True)
class CachedRepo:
    """A repository of the hub in the cache."""

    name: str
    """Its id, such as `black-forest-labs/FLUX.1-dev`, behind its kind where it is no model."""
    bytes: int
    """Those of its files, each counted once."""
    remove: str
    """The shell line that frees them."""


@dataclass(frozen=True)
class HubCache:
    """The hub's cache."""

    path: str
    """Its folder."""
    repos: tuple[CachedRepo, ...] = ()
    """What is in it, the largest first."""
    unfinished: int = 0
    """The bytes of downloads that were not finished."""

    @property
    def bytes(self) -> int:
        """The bytes of all of it."""
        return self.unfinished + sum(repo.bytes for repo in self.repos)


def hub_cache() -> HubCache:
    """The hub's cache of this user; an empty one where there is none."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    folder = Path(settings.HF_HUB_CACHE)
    try:
        found = scan_cache_dir(folder)
    except (CacheNotFound, OSError, ValueError):
        return HubCache(str(folder))
    repos = [CachedRepo(repo.repo_id if repo.repo_type == "model" else f"{repo.repo_type} {repo.repo_id}",
                        repo.size_on_disk, f"hf cache rm {shlex.quote(f'{repo.repo_type}/{repo.repo_id}')}")
             for repo in found.repos]
    unfinished = sum(path.stat().st_size for path in folder.glob("*/blobs/*.incomplete") if path.is_file())
    return HubCache(str(folder), tuple(sorted(repos, key=lambda repo: (-repo.bytes, repo.name))), unfinished)
