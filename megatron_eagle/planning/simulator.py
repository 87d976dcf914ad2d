"""A pipeline step, pass by pass: when each stage works, when it waits, and how long the step takes.

A discrete-event simulation of the order in ``schedule.py``. A stage runs its passes one after another; a forward pass
waits for the same microbatch on the virtual stage before, a backward pass for the one behind, each with the time of a
transfer between. Passes may all take different times, as ragged packs do. Sends are taken not to block the sender.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_eagle.planning.schedule import Pass, passes

Seconds = float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    busy: seconds that each stage computes; seconds: from its first pass to the last of all. ends, starts: of the passes
    of each stage, in the order in which they run.
    """

    busy: tuple[Seconds, ...]
    seconds: Seconds
    ends: tuple[dict[Pass, Seconds], ...]
    starts: tuple[dict[Pass, Seconds], ...]

    @property
    def balance(self) -> float:
        """Mean over largest time of a stage: the share of the hardware that could be busy if nothing ever waited."""
        return sum(self.busy) / len(self.busy) / max(self.busy) if max(self.busy) else 1.0

    @property
    def bubble(self) -> float:
        """Share of all stages' time that is spent waiting."""
        return 1 - sum(self.busy) / len(self.busy) / self.seconds if self.seconds else 0.0


def simulate(
    pp: int,
    vpp: int | None,
    microbatches: int,
    duration: Callable[[int, Pass], Seconds],
    transfer: Seconds = 0.0,
) -> Timeline:
    """Run a step. duration(virtual stage, pass): seconds; virtual stages are numbered in the order of layers."""
    last = pp * (vpp or 1) - 1
    orders = [passes(pp, vpp, rank, microbatches) for rank in range(pp)]
    done: dict[tuple[str, int, int], Seconds] = {}
    ends: list[dict[Pass, Seconds]] = [{} for _ in range(pp)]
    starts: list[dict[Pass, Seconds]] = [{} for _ in range(pp)]
    clocks, busy, position = [0.0] * pp, [0.0] * pp, [0] * pp
    waiting = set(range(pp))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            while position[rank] < len(orders[rank]):
                event = orders[rank][position[rank]]
                stage = event.chunk * pp + rank
                ready = _ready(event, stage, last, done, transfer)
                if ready is None:
                    break
                seconds = duration(stage, event)
                starts[rank][event] = max(clocks[rank], ready)
                clocks[rank] = starts[rank][event] + seconds
                busy[rank] += seconds
                done[event.kind, event.microbatch, stage] = ends[rank][event] = clocks[rank]
                position[rank] += 1
                moved = True
            if position[rank] == len(orders[rank]):
                waiting.discard(rank)
        if waiting and not moved:
            raise RuntimeError(f"pipeline stages {sorted(waiting)} wait for each other for ever")
    return Timeline(tuple(busy), max(clocks), tuple(ends), tuple(starts))


def _ready(
    event: Pass, stage: int, last: int, done: dict[tuple[str, int, int], Seconds], transfer: Seconds
) -> Seconds | None:
    """When a pass may start; None if what it waits for has not been simulated yet."""
    if event.kind == "forward":
        return 0.0 if stage == 0 else _after(done.get(("forward", event.microbatch, stage - 1)), transfer)
    if stage == last:
        return done.get(("forward", event.microbatch, stage))
    return _after(done.get(("backward", event.microbatch, stage + 1)), transfer)


def _after(moment: Seconds | None, transfer: Seconds) -> Seconds | None:
    return None if moment is None else moment + transfer
