"""Writing a checkpoint while training goes on, so that it exists whole or not at all.

Training waits only while this process's share is gathered and copied into host memory; a thread writes the copy. At the
end of each later step the processes ask each other whether all have written, and once they have, rank 0 adds the index
and the checksums, renames ``step_N.partial`` and moves ``latest`` last. Nothing else waits for anybody, and a
``kill -9`` at any moment takes the thread along and leaves the checkpoint before untouched.

A thread, because Megatron's own writers are forked: out of a process full of threads that may hold locks, and they go
on writing after the trainer was killed. Writing holds Python's lock for milliseconds at a time.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eagle.checkpoint.best import BEST, Best
from megatron_eagle.checkpoint.files import POSITION_FILE, PROCESS_FILE, Description
from megatron_eagle.checkpoint.sharded_state import (
    CONTENT,
    TrainingState,
    optimizer_parts,
    random_state,
    sharded_state,
)
from megatron_eagle.checkpoint.writer import (
    PARTIAL,
    Save,
    describe_failure,
    keep_best_and_newest,
    publish,
    start_partial,
    write,
)
from megatron_eagle.compat.checkpoint_saving import plan_save
from megatron_eagle.errors import Superseded, UserError
from megatron_eagle.parallel.agreement import on_rank_zero
from megatron_eagle.parallel.groups import Groups

FAILURES_IN_A_ROW = 2  # a full disk may be cleared while the run goes on; after so many it has to be told


class SaveFailed(UserError):
    """A checkpoint could not be written; the one before it is untouched."""


class Saver:
    """Saves the checkpoints of one stage, one at a time; every process calls the same methods at the same steps.

    device: where small tensors for the exchange between processes lie. keep: how many checkpoints stay.
    tokenizer: its files by name, which go into every checkpoint (rank 0). say: tells the user a line, on one process.
    start: number of this start of the run, in the names of folders that are being written, so that no two starts write
    into one. may_publish: called on rank 0 before a checkpoint is begun or becomes whole; raises Superseded, which is
    then raised on every process.
    """

    def __init__(
        self,
        stage_folder: Path,
        groups: Groups,
        device: torch.device,
        *,
        keep: int,
        tokenizer: Mapping[str, bytes] | None = None,
        say: Callable[[str], None] = lambda line: None,
        start: int | None = None,
        may_publish: Callable[[], None] = lambda: None,
    ) -> None:
        self._may_publish = may_publish
        self._partial = PARTIAL if start is None else f".{start}{PARTIAL}"
        self._folder, self._groups, self._device, self._keep, self._say = stage_folder, groups, device, keep, say
        self._tokenizer = dict(tokenizer or {})
        self._pending: Save | None = None
        self._scored: Best | None = None  # of a step whose save has not begun
        self._saved: int | None = None  # step of the newest checkpoint that this start published
        self._checked = False
        self._failures, self._last_failure = 0, ""
        self._stall = 0.0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been started and is not there yet."""
        return self._pending is not None

    def take_stall(self) -> float:
        """Seconds that training has waited for checkpoints since this was asked last."""
        stall, self._stall = self._stall, 0.0
        return stall

    def score(self, scored: Best) -> None:
        """What the checkpoint of a step scored: noted, if it is the best, once that checkpoint is there, not before.

        The step is the one saved last, whose save has been finished, or one that is saved next.
        """
        if scored.step != self._saved:
            self._scored = scored
            return
        final = self._folder / scored.name
        self._on_rank_zero(self._folder / BEST, lambda _: keep_best_and_newest(final, scored, self._keep))

    def start(self, description: Description, state: TrainingState, data_position: bytes | None) -> None:
        """Copy the state and begin to write it; waits for the save before this one.

        data_position: the stream's state on readers, None elsewhere.
        """
        self.finish()
        with self._stalled():
            final = self._folder / f"step_{description.step:08d}"
            try:
                self._on_rank_zero(final.with_suffix(self._partial), start_partial)
            except SaveFailed as failure:
                self._count(failure)
                return
            save = self._copy(final, description, state, data_position)
            save.thread = threading.Thread(target=write, args=(save,), name="checkpoint-writer", daemon=True)
            save.thread.start()
            self._pending = save

    def after_step(self) -> None:
        """Let the checkpoint exist if all processes have written their share; costs a small exchange otherwise."""
        if self._pending is None:
            return
        with self._stalled():
            thread = self._pending.thread
            assert thread is not None
            busy = torch.tensor([thread.is_alive()], dtype=torch.int32, device=self._device)
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
            if not busy:
                self._conclude(self._pending)

    def finish(self, *, must: bool = False) -> None:
        """Wait until the checkpoint is there. must: a failure is raised even if it is the first in a row."""
        if self._pending is not None:
            with self._stalled():
                assert self._pending.thread is not None
                self._pending.thread.join()
                self._conclude(self._pending)
        if must and self._failures:
            raise SaveFailed(self._last_failure)

    def _copy(self, final: Path, description: Description, state: TrainingState, data_position: bytes | None) -> Save:
        started = time.perf_counter()
        if state.ema:
            state.ema.to_gradients()
        stored = sharded_state(state, optimizer_parts(state, is_loading=False))
        # That the shards make up whole tensors is checked once; the next saves have the same.
        partial = final.with_suffix(self._partial)
        planned = plan_save({**stored, "content_metadata": CONTENT}, partial, check=not self._checked)
        self._checked = True
        small: dict[str, Any] = {PROCESS_FILE.format(self._groups.rank): random_state()}
        if data_position is not None:
            position = torch.frombuffer(bytearray(data_position), dtype=torch.uint8)
            small[POSITION_FILE.format(self._groups.dp_rank)] = position
        parts = (planned.index, planned.writer, planned.common, planned.buckets)
        scored = self._scored if self._scored and self._scored.step == description.step else None
        return Save(description, final, partial, *parts, small, self._tokenizer, started, scored)

    def _conclude(self, save: Save) -> None:
        self._pending = None
        errors: list[str | None] = [None] * self._groups.world_size
        dist.all_gather_object(errors, save.error)
        try:
            if any(errors):
                raise SaveFailed("; ".join(error for error in errors if error))
            parts: list[Any] | None = [None] * self._groups.world_size if self._groups.rank == 0 else None
            dist.gather_object((save.results, save.measured), parts)
            self._on_rank_zero(save.partial, lambda _: publish(save, parts or [], self._keep))
        except SaveFailed as failure:
            if self._groups.rank == 0:  # its bytes are what the disk lacks
                shutil.rmtree(save.partial, ignore_errors=True)
            self._count(failure)
            return
        self._failures, self._saved = 0, save.description.step
        total = time.perf_counter() - save.started
        name = save.description.stage
        self._say(f"{name} saved {save.final} in {total:.1f}s")

    def _count(self, failure: SaveFailed) -> None:
        self._failures += 1
        self._last_failure = str(failure)
        if self._failures >= FAILURES_IN_A_ROW:
            raise failure
        self._say(f"{failure}; training goes on, the next save tries again")

    def _on_rank_zero(self, file: Path, action: Callable[[Path], None]) -> None:
        """Run ``action`` on rank 0 while the others wait; its failure is everybody's, so that nobody waits for ever."""

        def act() -> None:
            try:
                self._may_publish()
                action(file)
            except (Superseded, UserError):
                raise
            except (OSError, RuntimeError) as error:
                raise SaveFailed(describe_failure(file, error)) from error

        on_rank_zero(act)

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._stall += time.perf_counter() - started
