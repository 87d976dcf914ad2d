"""Blocks over the machines of a Ray cluster (``--engine ray``, the extra ``ray``): actors that work on one at a time.

The block model stays what it is: a block's result is a file in the run's folder, which all machines see under the same
path, as they see the media. So what Ray has to do is small: place actors with the CPUs and GPUs that a segment's
operators take up, and say which of them died. A block whose actor or machine died is given to another one; what was
finished is on disk. Actors that find no room wait for it and are given nothing until they have started.
"""

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.curation.block import Job, Segment, result_file, run_block, segments
from megatron_eagle.curation.operator import Resources
from megatron_eagle.curation.plan import Plan
from megatron_eagle.errors import UserError

LOCAL = "local"  # a cluster of this machine alone, which lasts as long as the run
ATTEMPTS = 4  # at a block, before its operators are taken for what ends its process
SECONDS_BETWEEN_LOOKS = 30.0  # at what machines are left, while nothing answers


@dataclass(frozen=True)
class BlockWorker:
    """What an actor holds. It works where the run was started, since a plan's paths start there."""

    plan: Plan
    state: Path
    folder: Path

    def begin(self) -> None:
        """UserError if this machine does not see the run's folders."""
        for path in (self.folder, self.state):
            if not path.is_dir():
                raise UserError(
                    f"machine {socket.gethostname()} does not see {path}: all machines of a Ray cluster need the same "
                    "paths"
                )
        os.chdir(self.folder)

    def run(self, segment: Segment, job: Job) -> None:
        """Takes a block through a segment."""
        run_block(self.plan, segment, job, self.state)


@dataclass
class RayCluster:
    """At most ``workers`` actors on the cluster at ``address``: 'auto' is the one that this machine is part of.

    A Ray that this process has started already is used, and left running. Raises UserError if Ray is not installed,
    does not answer, or has no machine with what a segment's operators take up.
    """

    plan: Plan
    state: Path
    workers: int
    address: str = LOCAL
    _ray: Any = field(default=None, init=False)
    _scratch: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)
    _uses: Resources | None = field(default=None, init=False)
    _idle: list[Any] = field(default_factory=list, init=False)
    # What an actor will answer -> it and its block, None where it was only asked to begin.
    _asked: dict[Any, tuple[Any, Job | None]] = field(default_factory=dict, init=False)
    _lost: int = field(default=0, init=False)  # actors that ended before they began, in a row
    _attempts: Counter[Path] = field(default_factory=Counter, init=False)  # at a result whose actor died

    def __enter__(self) -> "RayCluster":
        try:
            import ray
        except ImportError:
            raise UserError("engine 'ray' needs the package ray: pip install '.[ray]' beside setup.py") from None
        self._ray = ray
        if not ray.is_initialized():
            self._connect()
        try:
            for segment in segments(self.plan):
                self._require_room(segment.resources)
        except BaseException:
            self.__exit__()  # nobody else does: this is not entered
            raise
        return self

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        # Of its own, so that nobody else finds it as "the cluster of this machine"; short, for its sockets' names.
        self._scratch = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        if self.address == LOCAL:
            options |= {"include_dashboard": False, "_temp_dir": self._scratch.name}
        try:
            self._ray.init(address=self.address, **options)
        except (ConnectionError, ValueError, RuntimeError, self._ray.exceptions.RayError) as error:
            self._scratch.cleanup()
            raise UserError(f"no Ray cluster at {self.address!r}: {_first_line(error)}") from None

    def __exit__(self, *_: object) -> None:
        self._dismiss()
        if self._scratch is not None:
            self._ray.shutdown()
            self._scratch.cleanup()

    def run(self, segment: Segment, jobs: Iterator[Job]) -> None:
        """Works on all jobs; in memory are those that actors work on, those to do again, and one read ahead."""
        if segment.resources != self._uses:
            self._dismiss()
            self._uses = segment.resources
            for _ in range(self.workers):
                self._start(segment.resources)
        again: list[Job] = []
        ahead = next(jobs, None)
        while ahead is not None or again or any(job for _, job in self._asked.values()):
            if not self._idle or (ahead is None and not again):
                self._take(segment, again)
                continue
            actor = self._idle.pop()
            job = again.pop() if again else ahead
            self._asked[actor.run.remote(segment, job)] = (actor, job)
            if job is ahead:
                ahead = next(jobs, None)

    def _start(self, uses: Resources) -> None:
        kind = self._ray.remote(BlockWorker).options(
            num_cpus=uses.cpus, num_gpus=uses.gpus, scheduling_strategy="SPREAD"
        )
        self._begin(kind.remote(self.plan, self.state, Path.cwd()))

    def _begin(self, actor: Any) -> None:
        self._asked[actor.begin.remote()] = (actor, None)

    def _take(self, segment: Segment, again: list[Job]) -> None:
        """Waits for one actor's answer; the block of one that died goes into ``again``."""
        answered, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        if not answered:
            self._require_room(segment.resources)
            return
        actor, job = self._asked.pop(answered[0])
        try:
            self._ray.get(answered[0])
        except self._ray.exceptions.RayTaskError as error:  # of ours, which would end the run in any engine
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)  # it may only be out of reach
            self._note_loss(segment, job, error)
            again += [job] if job is not None else []
            self._start(segment.resources)
            for other in self._idle:  # of the same machine, maybe
                self._begin(other)
            self._idle.clear()
        else:
            self._lost = 0
            self._idle.append(actor)

    def _note_loss(self, segment: Segment, job: Job | None, error: Exception) -> None:
        """UserError if that cannot be the machines' fault any more."""
        if job is None:
            self._lost += 1
            if self._lost >= ATTEMPTS * self.workers:
                raise UserError(f"Ray cannot start a process: {_first_line(error)}")
            return
        file = result_file(self.state, segment.number, job.source, job.block)
        self._attempts[file] += 1
        if self._attempts[file] >= ATTEMPTS:
            source = self.plan.sources[job.source].name
            raise UserError(
                f"block {job.block} of source '{source}' was begun {ATTEMPTS} times and its process ended each time; "
                "out of memory?"
            )

    def _require_room(self, uses: Resources) -> None:
        """Some machine that is alive could hold an actor; otherwise all would wait for ever."""
        wanted = {"CPU": uses.cpus, "GPU": uses.gpus}
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= many for kind, many in wanted.items()) for node in alive):
            has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in alive)
            raise UserError(
                f"an operator takes up {uses.cpus:g} CPUs and {uses.gpus:g} GPUs, which no machine of the Ray "
                f"cluster has ({has})"
            )

    def _dismiss(self) -> None:
        for actor in [*self._idle, *(actor for actor, _ in self._asked.values())]:
            self._ray.kill(actor)
        self._idle.clear()
        self._asked.clear()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
