"""Where the seconds go between the birth of a process and its first step, by parts.

On many nodes a start costs what minutes of hundreds of GPUs cost, and what costs it differs: a file system that serves
a thousand imports, groups, a checkpoint. Each process times its own parts; the slowest of each goes into the log and
the run's events. What grows with what is in ``docs/scale.md``.
"""

import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist

Reached = Callable[[str], None]


class StartUp:
    """Seconds of the parts, in their order; each begins where the one before ends, the first with the process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.parts: dict[str, float] = {}
        self._clock, self._last = clock, float(psutil.Process().create_time())

    def reached(self, part: str) -> None:
        """``part`` has just ended. All processes of a run name the same parts in the same order."""
        now = self._clock()
        self.parts[part], self._last = max(0.0, now - self._last), now

    def slowest(self, device: torch.device) -> dict[str, float]:
        """Of each part the seconds of the process that was slowest in it, and of ``all`` of them together.

        Every process of the run calls this.
        """
        own = torch.tensor([*self.parts.values(), sum(self.parts.values())], dtype=torch.float64, device=device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        return dict(zip([*self.parts, "all"], own.tolist(), strict=True))


def describe(slowest: dict[str, float]) -> str:
    """On one line, for the log."""
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in slowest.items() if part != "all")
    return f"first step after {slowest['all']:.1f} s (slowest process of each): {parts}"
