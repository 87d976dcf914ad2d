"""``python -m eagle_kernels.check``: everything this machine can show about the kernels, as one table.

Values and gradients in Triton's interpreter, builds for three GPU generations against a budget, the roofline, and
with ``--gpu`` the values on the GPU. Exit code 1 if a row failed. Example:

    python -m eagle_kernels.check --kernel pixel_shuffle_concat --json check.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eagle_kernels.checking.registry import KERNELS
from eagle_kernels.checking.tiers import FAILED, SKIPPED, Row, run

CPU_TIERS = ("interpreter", "compile", "roofline")
HEADER = ("kernel", "tier", "case", "max error", "allowed", "registers", "spill B", "shared B", "wgmma", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tiers, prints the table, returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eagle_kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="also check the values on the GPU")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this kernel; can be repeated")
    parser.add_argument("--tier", action="append", choices=CPU_TIERS, help="only this tier; can be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    chosen = parser.parse_args(arguments)

    kernels = chosen.kernel or list(KERNELS)
    rows: list[Row] = []
    for tier in chosen.tier or CPU_TIERS:
        rows += _shown(tier, kernels)
    if chosen.gpu:
        rows += _shown("gpu", kernels)
    else:
        rows.append(Row("all", "gpu", "-", SKIPPED, detail="not asked for (--gpu)"))

    print(table(rows))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    failed = [row for row in rows if row.verdict == FAILED]
    print(f"\n{len(rows)} rows, {len(failed)} failed")
    return 1 if failed else 0


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; what a tier does not measure stays empty, reasons and remarks stand at the end of the line."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    details = ["", *(row.detail for row in rows)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), detail]).rstrip()
        for line, detail in zip(cells, details, strict=True)
    )


def _shown(tier: str, kernels: list[str]) -> list[Row]:
    """The rows of one tier; a counter tells a person at a terminal that something is going on."""
    rows = []
    for row in run(tier, kernels):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{tier}: {len(rows)} rows", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (row.registers, row.spilled_bytes, row.shared_bytes, row.wgmma)
    errors = ("" if value is None else f"{value:.1e}" for value in (row.error, row.tolerance))
    counts = ("" if value is None else str(value) for value in numbers)
    return (row.kernel, row.tier, row.case, *errors, *counts, row.verdict)


if __name__ == "__main__":
    sys.exit(main())
