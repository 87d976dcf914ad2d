"""Fresh processes that share the work of this one: it may hold threads, which do not survive a fork."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerPool(ProcessPoolExecutor):
    """A ProcessPoolExecutor of spawned processes that do not hear Ctrl-C: a terminal sends it to all, this one decides.

    initializer: called in each of them before its first work.
    """

    def __init__(self, workers: int, initializer: Callable[[], None] | None = None) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), initializer)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As ProcessPoolExecutor's. The first one starts the processes, which inherit what is blocked meanwhile."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
