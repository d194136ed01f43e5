"""Calls that another thread makes meanwhile: a wait for the disk, a hash of many bytes."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Generic, TypeVar

Result = TypeVar("Result")
THREADS = 4


class Background(Generic[Result]):
    """A call that is on its way, in one of a few threads that stay: on a busy machine a new one is slow to start."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call, self._future = call, _pool().submit(call)

    def result(self) -> Result:
        """What the call gives, or raises."""
        # One that no thread has come to yet, as on a busy machine, is not waited for.
        return self._call() if self._future.cancel() else self._future.result()

    def end(self) -> None:
        """Return when no thread makes the call any more; what it gives is not asked for."""
        if not self._future.cancel():
            wait([self._future])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="background")


# A fork has none of the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
