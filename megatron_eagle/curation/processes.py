"""Processes of this machine that work on blocks: the engine where one machine is enough."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eagle.curation.block import Job, Segment, run_block
from megatron_eagle.curation.operator import Resources
from megatron_eagle.curation.plan import Plan
from megatron_eagle.data.build.worker_pool import WorkerPool
from megatron_eagle.errors import UserError

BLOCKS_AHEAD = 2  # of each process, read but not yet worked on


def processes_for(resources: Resources, workers: int) -> int:
    """How many processes share ``workers`` CPUs, of this size; those that use a GPU share the first one."""
    least = 1 / resources.gpus if resources.gpus else workers
    return max(1, int(min(workers, least, workers / max(resources.cpus, 1))))


@dataclass
class Processes:
    """This process alone, or several. They are new where a segment takes up something else than the one before."""

    plan: Plan
    state: Path
    workers: int
    _pool: WorkerPool | None = field(default=None, init=False)
    _uses: Resources = field(default_factory=Resources, init=False)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, segment: Segment, jobs: Iterator[Job]) -> None:
        """Works on all jobs, no more than a few of them in memory."""
        if self.workers == 1:
            for job in jobs:
                run_block(self.plan, segment, job, self.state)
            return
        processes = processes_for(segment.resources, self.workers)
        if self._pool is None or segment.resources != self._uses:
            self.__exit__()
            self._pool, self._uses = WorkerPool(processes, _end_with_parent), segment.resources
        running: dict[Future[None], Job] = {}
        try:
            for job in jobs:
                running[self._pool.submit(run_block, self.plan, segment, job, self.state)] = job
                if len(running) >= processes * BLOCKS_AHEAD:
                    _take_finished(running)
            while running:
                _take_finished(running)
        except BrokenProcessPool:
            numbers = ", ".join(str(job.block) for job in running.values())
            raise UserError(f"a process that works on one of the blocks {numbers} was killed; out of memory?") from None


def _take_finished(running: dict[Future[None], Job]) -> None:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        future.result()
        del running[future]


def _end_with_parent() -> None:
    """A worker ends when the process that started it is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
