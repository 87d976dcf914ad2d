"""Compiles kernels for GPUs that are not there and reads registers, spills, shared memory and tensor-core use.

Triton's wheel brings NVIDIA's assembler, so PTX and machine code can be made anywhere. A configuration that is too big
compiles without complaint and fails at launch, or runs slowly from spilled registers; hence the budget. What this
cannot show: that the code is right, or how fast it is.
"""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from eagle_kernels.checking.registry import Compilation
from eagle_kernels.device import INTERPRETED

# Shared memory one block can have, bytes (CUDA C++ programming guide, technical specifications per compute capability).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTER_FILE = 65_536  # 32-bit registers of one multiprocessor, all three architectures
WARP = 32


@dataclass(frozen=True)
class Build:
    """One configuration built for one architecture; ``wgmma``, ``mma``, ``tcgen05`` count instructions in the PTX."""

    label: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    tcgen05: int
    seconds: float


def build(compilation: Compilation, architecture: int) -> Build:
    """Builds and measures. Triton's own exceptions pass through: an invalid kernel is an error, not a measurement."""
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process (TRITON_INTERPRET=1): nothing can be compiled")
    started = time.perf_counter()
    compiled = triton.compile(
        _source(compilation),
        target=GPUTarget("cuda", architecture, WARP),
        options={"num_warps": compilation.num_warps, "num_stages": compilation.num_stages},
    )
    ptx: str = compiled.asm["ptx"]
    registers, spilled = _assembled(ptx, architecture)
    return Build(
        label=compilation.label,
        architecture=architecture,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        seconds=time.perf_counter() - started,
    )


def complaints(compilation: Compilation, built: Build) -> list[str]:
    """What is over budget, each in a few words with its numbers; empty if the configuration may be used."""
    threads = WARP * compilation.num_warps
    limit = SHARED_LIMIT[built.architecture]
    found = []
    if built.spilled_bytes:
        found.append(f"spills {built.spilled_bytes} B")
    if built.shared_bytes > limit:
        found.append(f"shared memory {built.shared_bytes} B > {limit} B")
    if built.registers * threads > REGISTER_FILE:
        found.append(f"{built.registers} registers x {threads} threads > {REGISTER_FILE}")
    if compilation.needs_wgmma and built.architecture == 90 and not built.wgmma:
        found.append("no wgmma on Hopper")
    return found


def _source(compilation: Compilation) -> ASTSource:
    kernel: Any = compilation.kernel
    names = kernel.arg_names
    return ASTSource(
        fn=kernel,
        signature={name: compilation.signature.get(name, "constexpr") for name in names},
        constexprs=compilation.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible_by_16},
    )


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers a thread and spilled bytes (stores and loads), from the assembler's own report.

    Triton throws the report away, so the PTX is assembled once more, with the option Triton adds.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", "--regAllocOptLevel=2"]
        command += [
            f"--gpu-name={sm_arch_from_capability(architecture)}",
            str(source),
            "-o",
            str(Path(folder, "kernel.o")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise RuntimeError(f"cannot read ptxas' report for sm_{architecture}: {report[-500:]!r}")
    return int(registers[1]), int(spills[1]) + int(spills[2])
