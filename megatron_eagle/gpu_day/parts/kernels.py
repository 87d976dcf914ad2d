"""The kernels' values and gradients against float64, in bfloat16 and float32, at odd sizes and Eagle 2's."""

from eagle_kernels.checking.registry import KERNELS
from eagle_kernels.checking.tiers import FAILED, SKIPPED, Row
from eagle_kernels.checking.tiers import run as run_tier

from megatron_eagle.gpu_day.part import PartResult, Setting, Table

ON_A_CPU = ("tile_prepare",)  # interpreted, the fastest; eagle_kernels.check interprets all of them


def run(setting: Setting) -> PartResult:
    """``python -m eagle_kernels.check --gpu``; on a CPU one kernel interpreted, and the reason."""
    rows = list(run_tier("gpu", KERNELS))
    if not setting.cuda:
        rows += run_tier("interpreter", ON_A_CPU)
    checked = [row for row in rows if row.verdict != SKIPPED]
    return PartResult(
        tables=(
            Table("Errors against float64", ("kernel", "case", "error", "allowed", ""), tuple(map(_cells, checked))),
        ),
        values={"rows": [vars(row) for row in rows]},
        skipped=tuple(f"kernels on the GPU: {row.detail}" for row in rows if row.verdict == SKIPPED),
        wrong=tuple(f"{row.kernel}, {row.case}: {_why(row)}" for row in rows if row.verdict == FAILED),
    )


def _cells(row: Row) -> tuple[str, ...]:
    error, allowed = ("-" if value is None else f"{value:.1e}" for value in (row.error, row.tolerance))
    return row.kernel, f"{row.tier}: {row.case}", error, allowed, row.verdict


def _why(row: Row) -> str:
    return row.detail[-500:] if row.error is None else f"error {row.error:.1e}, allowed {row.tolerance:.1e}"
