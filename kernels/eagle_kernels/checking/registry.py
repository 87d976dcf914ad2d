"""What a kernel declares so that it can be checked: value checks, builds for the compile tier, and its roofline.

Each kernel is a folder of ``eagle_kernels`` with an ``entry`` module that holds one ``ENTRY: KernelEntry``. Folders are
listed here and imported on demand, because a process must settle whether Triton interprets or compiles before any
kernel is imported.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

KERNELS = tuple(sorted(entry.parent.name for entry in Path(__file__).parents[1].glob("*/entry.py")))

H100_BANDWIDTH = 3.35e12  # bytes a second, HBM3 of the SXM5 module (NVIDIA H100 data sheet)
H100_BF16 = 989e12  # operations a second, dense bfloat16 tensor cores (same source)
ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200


@dataclass(frozen=True)
class Check:
    """One comparison with the float64 reference. ``run`` returns the largest error, to be at most ``tolerance``.

    ``run`` takes the device; on the CPU it is called in a process whose kernels are interpreted and whose bfloat16 is
    corrected. NaN as error fails, so that an element never written (poison) cannot pass.
    """

    label: str
    run: Callable[[torch.device], float]
    tolerance: float


@dataclass(frozen=True)
class Compilation:
    """One kernel with one configuration, to be built for each of ``architectures`` without a GPU.

    ``signature`` gives the type of every argument that is not a constexpr ("*bf16", "i32", "fp32"); ``divisible_by_16``
    names the arguments Triton would find divisible by 16 at launch, which decides whether loads are vectorised.
    ``chosen`` configurations, the ones training runs, must fit the GPU without spilling; the others are printed only.
    ``needs_wgmma``: on Hopper, matrix products must have become wgmma.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    chosen: bool = True
    needs_wgmma: bool = False
    architectures: tuple[int, ...] = ARCHITECTURES

    def __post_init__(self) -> None:
        names = set(self.kernel.arg_names)
        described = set(self.signature) | set(self.constexprs)
        if names != described or set(self.signature) & set(self.constexprs):
            raise ValueError(
                f"{self.label}: arguments {sorted(names ^ described)} are described not at all or without need"
            )
        if not set(self.divisible_by_16) <= set(self.signature):
            raise ValueError(
                f"{self.label}: divisible_by_16 names {self.divisible_by_16}, not all of them in the signature"
            )


@dataclass(frozen=True)
class Roofline:
    """The least a kernel can do: bytes that must cross the memory bus, and operations (a multiply-add is two)."""

    bytes_moved: int
    operations: int

    def floor_seconds(self, bandwidth: float = H100_BANDWIDTH, rate: float = H100_BF16) -> float:
        """No kernel is faster: the slower of memory and arithmetic, perfectly overlapped."""
        return max(self.bytes_moved / bandwidth, self.operations / rate)


@dataclass(frozen=True)
class KernelEntry:
    """Everything the tiers need to know about a kernel. ``rooflines`` maps a stated shape to its floor."""

    name: str
    checks: tuple[Check, ...]
    compilations: Callable[[], list[Compilation]]
    rooflines: dict[str, Roofline]
    gpu_checks: tuple[Check, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise ValueError(f"kernel {self.name} is no folder with an entry.py: {', '.join(KERNELS)}")


def entry(name: str) -> KernelEntry:
    """The entry of one kernel; importing it imports Triton."""
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name}, there are {', '.join(KERNELS)}")
    return importlib.import_module(f"eagle_kernels.{name}.entry").ENTRY
