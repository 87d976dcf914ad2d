"""How fast a kernel is beside others that do the same: times, memory, and the device's own copy bandwidth.

A kernel's ``timing.py`` has ``measured(device, toy)``, all contenders on all its cases, and ``aims(found, bandwidth)``,
what it set out to reach. ``megatron-eagle gpu-day`` runs them and writes the report. Not run yet: this project's
machines had no GPU when it was written. A CPU is never timed; there the plain versions run once, at toy sizes.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from eagle_kernels.checking.registry import KERNELS, Roofline

TIMED = tuple(name for name in KERNELS if (Path(__file__).parents[1] / name / "timing.py").exists())
COPY_BYTES = 2**30  # large enough that no cache helps
EAGER = "eager"  # how the names of contenders begin that run anywhere
NEEDS_CUDA = "needs a CUDA device"
NOT_TIMED = "ran; not timed, a CPU says nothing of a GPU"


@dataclass(frozen=True)
class Measurement:
    """One contender on one case; ``failure`` says why there is no time."""

    case: str
    contender: str
    roofline: Roofline
    milliseconds: float | None
    peak_bytes: int | None
    failure: str = ""

    @property
    def bytes_per_second(self) -> float | None:
        """The least traffic over the time."""
        return self.roofline.bytes_moved / (self.milliseconds * 1e-3) if self.milliseconds else None

    @property
    def operations_per_second(self) -> float | None:
        """None as well where there is no arithmetic to speak of."""
        return (self.roofline.operations or None) and self.milliseconds and (
            self.roofline.operations / (self.milliseconds * 1e-3)
        )  # fmt: skip


@dataclass(frozen=True)
class Aim:
    """Something a kernel set out to reach, what was found, and whether that is it."""

    aim: str
    found: str
    met: bool


def timing_of(kernel: str) -> Any:
    """The module ``timing`` of one kernel; importing it imports Triton."""
    return importlib.import_module(f"eagle_kernels.{kernel}.timing")


def measure(
    device: torch.device, case: str, contender: str, roofline: Roofline, function: Callable[[], object]
) -> Measurement:
    """The median of many runs with a cold L2 cache, and the most memory the function held beyond what was there before.

    A contender that cannot run (out of memory, a shape it refuses, a package that is missing) is reported, not fatal.
    """
    if device.type != "cuda":
        if contender.startswith(EAGER):
            function()
        return Measurement(case, contender, roofline, None, None, NOT_TIMED if contender[:5] == EAGER else NEEDS_CUDA)
    try:
        function()  # compiles and tunes outside the measurement
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Measurement(case, contender, roofline, triton.testing.do_bench(function, return_mode="median"), peak)
    except Exception as error:
        torch.cuda.empty_cache()
        said = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return Measurement(case, contender, roofline, None, None, said)


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second, read plus written, of the device's own copy: what a kernel that only moves memory can reach.

    None on a CPU.
    """
    if device.type != "cuda":
        return None
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def ratios(found: Sequence[Measurement], case: str, ours: str, theirs: str, value: str) -> float | None:
    """``value`` of ``theirs`` over that of ``ours`` on a case; None if either was not measured."""
    by_name = {one.contender: getattr(one, value) for one in found if one.case == case}
    mine, other = by_name.get(ours), by_name.get(theirs)
    return other / mine if mine and other else None
