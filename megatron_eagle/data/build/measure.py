"""Measuring data sets in parts, by several processes, restartable: a shard is the unit of work.

Each process takes shards and leaves what it found of each beside them (``order/measuring.py``). Part i of n takes every
n-th shard that is due. Whoever opens a data set afterwards reads what nobody has, and puts all together.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from megatron_eagle.data.build.part import Part
from megatron_eagle.data.build.worker_pool import WorkerPool
from megatron_eagle.data.order.measuring import ShardTask, TextOf, due_shards, is_measured, measure_shard
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

AHEAD = 2  # shards of each worker


@dataclass(frozen=True)
class MeasureReport:
    """Shards: due in all data sets, of this part, and of these measured now; the others had been."""

    due: int
    own: int
    now: int


def measure_shards(paths: Sequence[str], text: TextOf, *, part: Part | None = None, workers: int = 1) -> MeasureReport:
    """Measures what is due of the data sets at ``paths``, or a part of it, and keeps it beside their shards.

    part: every n-th shard; the same shards whenever it is started, until all were put together. workers: processes.
    Raises UserError if a path is no data set, a shard cannot be read, or nothing can be kept beside it.
    """
    own_part = part or Part()
    due = [task for path in dict.fromkeys(paths) for task in due_shards(path, text)]
    own = due[own_part.number - 1 :: own_part.parts]
    left = [task for task in own if not is_measured(task)]
    with Progress("measuring", total=len(own), unit="shards") as bar:
        bar.update(len(own) - len(left))
        for task in _measure_all(left, workers):
            if not is_measured(task) and task.stamp in {still.stamp for still in due_shards(task.folder, text)}:
                raise UserError(f"{task.folder}: nothing can be written there to keep what was measured of its shards")
            bar.update(1)
    return MeasureReport(len(due), len(own), len(left))


def _measure_all(tasks: Sequence[ShardTask], workers: int) -> Iterator[ShardTask]:
    """Each task when it is done."""
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            _measure(task)
            yield task
        return
    with WorkerPool(min(workers, len(tasks))) as pool:
        running: dict[Future[None], ShardTask] = {}
        try:
            for task in tasks:
                running[pool.submit(_measure, task)] = task
                if len(running) >= workers * AHEAD:
                    yield from _finished(running, FIRST_COMPLETED)
            yield from _finished(running, ALL_COMPLETED)
        except BrokenProcessPool:
            raise UserError("a process that measures a shard was killed; out of memory?") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[None], ShardTask], when: str) -> Iterator[ShardTask]:
    for future in wait(running, return_when=when).done:
        future.result()
        yield running.pop(future)


def _measure(task: ShardTask) -> None:
    """Its result stays beside the shard: what goes back to the process that asked is nothing."""
    measure_shard(task)
