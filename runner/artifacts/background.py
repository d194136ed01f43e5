"""Calls that another thread makes meanwhile: a wait for the disk, a hash of many bytes."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
THREADS = 4
# With fewer bytes, to wake another thread takes longer than to hash them.
ASIDE = 2**21


class Background(Generic[Answer]):
    """A call that is on its way."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self._call, self._future = call, _pool().submit(call)

    def result(self) -> Answer:
        """What the call gives, or raises."""
        # One that no thread has come to yet, as on a busy machine, is not waited for.
        return self._call() if self._future.cancel() else self._future.result()

    def end(self) -> None:
        """Return when no thread makes the call any more; what it gives is not asked for."""
        if not self._future.cancel():
            wait([self._future])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="aside")


# A fork has none of the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
