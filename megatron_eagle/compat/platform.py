"""Where a process computes: a GPU under NCCL, or a CPU under gloo.

With a GPU nothing is touched: NCCL and CUDA, as Megatron-Core expects. Without one Megatron-Core has no CPU mode, and
``cpu.py`` gives it one.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_eagle.compat.versions import require_known_megatron


@dataclass(frozen=True)
class Platform:
    """Where a process computes, and how processes talk.

    device: the device of this process.
    backend: torch.distributed backend for its collectives.
    redirected: (what Megatron asked for, "file.py:line" inside megatron/core) -> how often; filled while tracing on a
        CPU platform, always empty on CUDA.
    """

    device: torch.device
    backend: Literal["nccl", "gloo"]
    redirected: Counter[tuple[str, str]] = field(default_factory=Counter)

    def report(self) -> str:
        """One line per redirected call site, sorted."""
        return "\n".join(f"{count:8d}  {what:32s} {where}" for (what, where), count in sorted(self.redirected.items()))


def install(*, trace: bool = False, local_rank: int = 0) -> Platform:
    """Choose the platform of this process and, without CUDA, make Megatron-Core run on it. Calling it again is free.

    trace: count every redirected call in ``Platform.redirected`` (slower; for tests and for porting to a new version).
    local_rank: which of the host's GPUs this process uses.

    Raises UserError if megatron-core is another version than those whose private names are known.
    """
    require_known_megatron()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl")
    from megatron_eagle.compat.cpu import redirect  # with a GPU nothing of it is loaded

    return redirect(trace=trace)
