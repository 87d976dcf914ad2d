"""Megatron's plan of a torch_dist checkpoint - who writes what into which file - and its function that writes one file.

Leaned on, in ``megatron.core.dist_checkpointing``:

- ``TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks``: where writer and index pass by after planning. The
  public ``async_save`` returns callbacks only, which fork the writers out of the trainer;
- ``strategies.filesystem_async._results_queue``: set beforehand, so that no server process is started for the results;
- the arguments of an ``AsyncRequest`` and the form of its buckets, ``(path, key, (texts, tensors))``;
- ``FileSystemWriterAsync.write_preloaded_data``, which takes a bucket and puts what it wrote into a queue;
- ``state_dict_utils.save_preprocess``, which parts what is the same in every process from what is sharded.

No public way plans without also deciding how the files are written (checkpoint/saver.py says why that matters).
"""

import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_eagle.compat.versions import is_before_0_19

__all__ = ["FileSystemWriterAsync", "PlannedSave", "collect_results_here", "plan_save", "write_bucket"]


@dataclass(frozen=True)
class PlannedSave:
    """index, writer: what becomes ``.metadata`` (rank 0) and who writes it. common: what is the same in every process.
    buckets: copies of this process's tensors, by file; what ``write_bucket`` takes."""

    index: Any
    writer: FileSystemWriterAsync
    common: dict[str, Any]
    buckets: list[Any]


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's plan of who writes what, without its way of writing."""

    writer: FileSystemWriterAsync
    index: Any

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: Any, *strategy: str
    ) -> AsyncRequest:
        self.writer, self.index = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *strategy)


def plan_save(state: dict[str, Any], folder: Path, *, check: bool) -> PlannedSave:
    """Plan who writes which part of the sharded ``state`` into ``folder``, and copy this process's part; all processes
    of the run call this together. check: make sure that the shards make up whole tensors."""
    sharded, common = save_preprocess(state, check)
    collect_results_here()
    planner = _Planner("torch_dist", 1, thread_count=1)
    # From 0.19 on another strategy is the default: a package of NVIDIA's, which writes by itself.
    strategy = {} if is_before_0_19() else {"async_strategy": "mcore"}
    request = planner.async_save(sharded, folder, **strategy)
    return PlannedSave(planner.index, planner.writer, common, _copied(request))


def collect_results_here() -> None:
    """Take Megatron's next results in this process; otherwise it starts one more Python, a server, in every process."""
    filesystem_async._results_queue = queue.Queue()


def write_bucket(writer: FileSystemWriterAsync, number: int, bucket: Any) -> list[Any]:
    """Write one file and flush it; returns what ``writer.finish`` wants to know of it. Raises what writing raised."""
    done: queue.Queue[tuple[int, Any]] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(number)
    FileSystemWriterAsync.write_preloaded_data([writer.transforms], number, bucket, done, running, True)
    _, results = done.get_nowait()
    if isinstance(results, Exception):
        raise results
    return list(results)


def _copied(request: AsyncRequest) -> list[Any]:
    """Megatron's write buckets with every tensor in host memory of its own, which training does not write to."""
    if request.preload_fn is None:  # this process has nothing to write
        return []
    live = {id(tensor) for _, _, (_, tensors) in request.async_fn_args[1] for _, tensor in tensors}
    return [
        (path, key, (texts, [(item, t.clone() if id(t) in live else t) for item, t in tensors]))
        for path, key, (texts, tensors) in request.preload_fn()
    ]
