"""Which process is slow: named while the run goes on, from what each one does without the others.

Steps take all processes the same time, because all wait for the slowest. So every few steps each measures what it does
alone: a small product on its device, a small loop on its host, and, where it reads, the reading; and the forward and
backward pass, which a replica's processes share. Rank 0 gets these numbers and holds each process against the others:
as far above their median as none of the others is, and that in most of the last measurements, makes a straggler.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.step import COMPUTING
from megatron_eagle.training.watchdog import node_name

EVERY = 5  # steps from one measurement to the next
WINDOW = 9  # measurements that are looked at: a process that turns slow is named after 25 steps, 45 at most
LEAST = 0.25  # slower than the median by this share of it, or of a step
DEVIATIONS = 6.0  # and by so many of the others' standard deviations
FEWEST = 4  # processes of which one can be told from the others
DEVICE, HOST, READING = "device", "host", "reading"
KINDS = (DEVICE, HOST, READING, COMPUTING)
ALONE = (DEVICE, HOST)  # what is the node's, whatever the run does
PRODUCT = {"cpu": (128, 1), "cuda": (2048, 8)}  # side, repeats: a fifth of a millisecond of a core or of an H100
LOOP = 8_000  # additions, a fifth of a millisecond
BEST_OF = 3  # tries, of which the quickest counts: what disturbs for a moment is no slowness

Array = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Straggler:
    """ratio: how slow, 1 being the median; of reading and computing what a step takes longer."""

    rank: int
    kind: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.kind} {self.ratio:.2f} times the median"


def find_stragglers(measured: Array, seconds: Array, peers: Array) -> list[Straggler]:
    """The processes that stand out, each by what shows it most.

    measured: [w, ranks, KINDS] seconds of the last measurements, NaN where a process has none. seconds: [w], of the
    steps. peers: [ranks]; forward and backward are compared among equals (of one pipeline stage).
    A median over time first, so that a single slow step is none; then the distance from the median of all in robust
    standard deviations (1.4826 times the median absolute deviation).
    """
    found: dict[int, Straggler] = {}
    own = np.median(measured, axis=0)  # NaN stays NaN
    for number, kind in enumerate(KINDS):
        alike = peers if kind == COMPUTING else np.zeros_like(peers)
        for peer in np.unique(alike):
            ranks = np.flatnonzero((alike == peer) & ~np.isnan(own[:, number]))
            if len(ranks) < FEWEST:
                continue
            values = own[ranks, number]
            usual = float(np.median(values))
            excess = (values - usual) / (usual if kind in ALONE else float(np.median(seconds)))
            limit = max(LEAST, DEVIATIONS * 1.4826 * float(np.median(np.abs(excess - np.median(excess)))))
            for rank, more in zip(ranks[excess > limit].tolist(), excess[excess > limit].tolist(), strict=True):
                if rank not in found or found[rank].ratio < 1 + more:
                    found[rank] = Straggler(rank, kind, 1 + more)
    return [found[rank] for rank in sorted(found)]


@dataclass(frozen=True)
class Change:
    """A process that turned slow, or that is no longer."""

    straggler: Straggler
    node: str
    slow: bool

    def values(self) -> dict[str, Any]:
        """For the run's events; ``alone``: whether the node is slow by itself, whatever the run does."""
        one = self.straggler
        ratio = round(one.ratio, 2)
        alone = one.kind in ALONE
        return {
            "rank": one.rank,
            "node": self.node,
            "slow": self.slow,
            "kind": one.kind,
            "ratio": ratio,
            "alone": alone,
        }

    def __str__(self) -> str:
        where = f"rank {self.straggler.rank} on {self.node}"
        return f"{where} is slow: {self.straggler}" if self.slow else f"{where} is slow no longer"


class StragglerWatch:
    """One process's clock; on rank 0 also the judge. Every process calls the same methods in the same steps."""

    def __init__(self, groups: Groups, device: torch.device) -> None:
        self._groups, self._device = groups, device
        self._on = groups.world_size >= FEWEST
        self._history: deque[tuple[Array, float]] = deque(maxlen=WINDOW)
        self._slow: dict[int, Straggler] = {}
        self._own = dict.fromkeys((READING, COMPUTING), 0.0)
        if self._on:
            side, _ = PRODUCT[device.type]
            self._factor = torch.ones(side, side, device=device, dtype=_product_type(device)) / side
            about = (node_name(), groups.pp_rank)
            every: list[Any] = [None] * groups.world_size
            dist.all_gather_object(every, about)
            self._nodes = [node for node, _ in every]
            self._peers = np.array([stage for _, stage in every], dtype=np.float64)

    @property
    def known(self) -> int:
        """How many processes are slow now; on rank 0."""
        return len(self._slow)

    def reading(self, read: Callable[[], T]) -> T:
        """``read()``, timed."""
        with self.timing(READING):
            return read()

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Adds what happens inside to ``kind``; on a GPU what it queues, seen by the GPU's own clock."""
        if self._device.type == "cuda" and kind == COMPUTING:
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            done.record()
            self._events = (begun, done)
            return
        started = time.perf_counter()
        yield
        self._own[kind] = time.perf_counter() - started

    def after_step(self, step: int, seconds: float) -> list[Change]:
        """What became known after ``step``, on rank 0; called when the device has nothing to do."""
        if not self._on or step % EVERY:
            return []
        own = torch.tensor(self._measure(), dtype=torch.float64, device=self._device)
        every = torch.empty(self._groups.world_size, len(KINDS), dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(every, own[None])
        if self._groups.rank:
            return []
        self._history.append((every.cpu().numpy(), seconds))
        if len(self._history) < WINDOW:
            return []
        measured, steps = zip(*self._history, strict=True)
        return self._changes(find_stragglers(np.stack(measured), np.array(steps), self._peers))

    def _changes(self, found: Sequence[Straggler]) -> list[Change]:
        now = {one.rank: one for one in found}
        ended = [self._slow[rank] for rank in sorted(self._slow.keys() - now.keys())]
        begun = [now[rank] for rank in sorted(now.keys() - self._slow.keys())]
        self._slow = now
        return [
            *(Change(one, self._nodes[one.rank], True) for one in begun),
            *(Change(replace(one, ratio=1.0), self._nodes[one.rank], False) for one in ended),
        ]

    def _measure(self) -> list[float]:
        """Seconds of each of KINDS."""
        device = min(self._product() for _ in range(BEST_OF))
        host = min(_loop() for _ in range(BEST_OF))
        if self._device.type == "cuda":
            begun, done = self._events
            self._own[COMPUTING] = begun.elapsed_time(done) / 1000
        reading = self._own[READING] if self._groups.is_reader else float("nan")
        return [device, host, reading, self._own[COMPUTING]]

    def _product(self) -> float:
        _, repeats = PRODUCT[self._device.type]
        if self._device.type == "cuda":
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            for _ in range(repeats):
                self._factor @ self._factor
            done.record()
            done.synchronize()
            return float(begun.elapsed_time(done)) / 1000
        started = time.perf_counter()
        for _ in range(repeats):
            self._factor @ self._factor
        return time.perf_counter() - started


def _loop() -> float:
    started = time.perf_counter()
    sum(range(LOOP))
    return time.perf_counter() - started


def _product_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
