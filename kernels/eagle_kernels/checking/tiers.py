"""The tiers, each in a process of its own, and the rows of their common table.

Whether Triton interprets or compiles is settled when it is imported, so one process cannot do both. ``run`` starts
``python -m eagle_kernels.checking.tiers TIER KERNEL...`` with the right environment; that process writes one row a
line.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eagle_kernels.checking.registry import Check, KernelEntry, entry

PACKAGES = Path(__file__).resolve().parents[2]  # the folder to import eagle_kernels from
PASSED, FAILED, SKIPPED, SHOWN = "pass", "FAIL", "skip", "-"


@dataclass(frozen=True)
class Row:
    """One line of the table. What a tier does not measure is None; ``detail`` is the reason or a remark."""

    kernel: str
    tier: str
    case: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    wgmma: int | None = None
    detail: str = ""


def run(tier: str, kernels: Iterable[str]) -> Iterator[Row]:
    """The rows of one tier as they come. If its process dies, a last row says so: a tier never passes silently."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGES), environment.get("PYTHONPATH", "")]))
        environment["TRITON_CACHE_DIR"] = cache
        if tier == "interpreter":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "eagle_kernels.checking.tiers", tier, *kernels]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield Row(**json.loads(line))
        if process.returncode:
            errors.seek(0)
            yield Row(
                "all", tier, "process", FAILED, detail=f"exit {process.returncode}: {errors.read()[-2000:].strip()}"
            )


def interpreter(kernels: Iterable[str]) -> Iterator[Row]:
    """Every check on the CPU, kernels interpreted."""
    from eagle_kernels.checking.interpreter import correct_bfloat16  # refuses to run elsewhere

    correct_bfloat16()
    poison_memory()
    for name in kernels:
        for check in entry(name).checks:
            yield _compared(name, "interpreter", check, torch.device("cpu"))


def gpu(kernels: Iterable[str]) -> Iterator[Row]:
    """Every check on the GPU, the ones for GPUs included; one row with the reason where there is none."""
    if not torch.cuda.is_available():
        yield Row("all", "gpu", "-", SKIPPED, detail="torch finds no CUDA device")
        return
    poison_memory()
    for name in kernels:
        found = entry(name)
        for check in (*found.checks, *found.gpu_checks):
            yield _compared(name, "gpu", check, torch.device("cuda"))


def poison_memory() -> None:
    """From now on torch fills uninitialised memory with NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def compiled(kernels: Iterable[str]) -> Iterator[Row]:
    """Every configuration built for every architecture it is meant for, the chosen ones held to the budget."""
    for name in kernels:
        yield from _builds(entry(name))


def roofline(kernels: Iterable[str]) -> Iterator[Row]:
    """The floor on an H100 that bytes and operations imply; there is nothing to pass."""
    for name in kernels:
        for shape, floor in entry(name).rooflines.items():
            detail = f"floor {floor.floor_seconds() * 1e3:.3f} ms on H100: {floor.bytes_moved / 1e9:.2f} GB"
            if floor.operations:
                detail += f", {floor.operations / 1e12:.2f} T operations"
            yield Row(name, "roofline", shape, SHOWN, detail=detail)


TIERS: dict[str, Callable[[Iterable[str]], Iterator[Row]]] = {
    "interpreter": interpreter,
    "compile": compiled,
    "roofline": roofline,
    "gpu": gpu,
}


def _compared(kernel: str, tier: str, check: Check, device: torch.device) -> Row:
    try:
        error = check.run(device)
    except Exception:  # whatever goes wrong in one check must not hide the others
        return Row(kernel, tier, check.label, FAILED, detail=traceback.format_exc(limit=-2).strip())
    good = math.isfinite(error) and error <= check.tolerance
    return Row(kernel, tier, check.label, PASSED if good else FAILED, error=error, tolerance=check.tolerance)


def _builds(found: KernelEntry) -> Iterator[Row]:
    from eagle_kernels.checking import ahead_of_time  # only this tier needs Triton's compiler

    for compilation in found.compilations():
        for architecture in compilation.architectures:
            case = f"{compilation.label} sm_{architecture}"
            try:
                built = ahead_of_time.build(compilation, architecture)
            except Exception as error:
                verdict = FAILED if compilation.chosen else SHOWN
                yield Row(found.name, "compile", case, verdict, detail=f"{type(error).__name__}: {error}"[:500])
                continue
            over = ahead_of_time.complaints(compilation, built)
            budget = FAILED if over else PASSED
            yield Row(
                found.name,
                "compile",
                case,
                budget if compilation.chosen else SHOWN,
                registers=built.registers,
                spilled_bytes=built.spilled_bytes,
                shared_bytes=built.shared_bytes,
                wgmma=built.wgmma,
                detail="; ".join(over),
            )


def main(arguments: list[str]) -> None:
    """Writes the rows of one tier to standard output, whatever kernels print going to standard error."""
    tier, kernels = arguments[0], arguments[1:]
    rows, sys.stdout = sys.stdout, sys.stderr
    for row in TIERS[tier](kernels):
        print(json.dumps(asdict(row)), file=rows, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
