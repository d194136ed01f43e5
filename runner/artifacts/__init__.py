"""Where the states between the stages are kept: content-addressed and checked on every read."""

from runner.artifacts.backends import FolderStore, ForwardingStore, MemoryStore, Where, open_store
from runner.artifacts.manifest import Artifact, key_of
from runner.artifacts.store import Store

__all__ = ["Artifact", "FolderStore", "ForwardingStore", "MemoryStore", "Store", "Where", "key_of", "open_store"]
