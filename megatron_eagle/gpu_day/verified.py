"""Rows of ``verify`` as the result of a part."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_eagle.gpu_day.part import PartResult, Table
from megatron_eagle.model.build_context import Kernels
from megatron_eagle.verification.check import TOLERANCES, Result, Verifier
from megatron_eagle.verification.rows import Row

TOY_ROWS = 2
HEADER = ("processes", "layout and options", "loss", "gradients", "weights", "")


def verified(rows: Sequence[Row], kernels: Sequence[Kernels], toy: bool, skipped: tuple[str, ...] = ()) -> PartResult:
    """``rows`` with each of ``kernels``, in processes of their own; distances above ``TOLERANCES`` are wrong.

    toy: the first and the last row only.
    """
    chosen = [rows[0], rows[-1]][:TOY_ROWS] if toy else rows
    results: list[Result] = []
    with Verifier() as verifier:
        verifier.check_all([replace(row, kernels=name) for name in kernels for row in chosen], results.append)
    limits = "; ".join(
        f"{name}: loss {one.loss:g}, gradients {one.gradient:g}, weights {one.weight:g}"
        for name, one in TOLERANCES.items()
    )
    return PartResult(
        tables=(Table(f"Relative distances from one plain float64 process; allowed {limits}", HEADER, _rows(results)),),
        values={"rows": [vars(one) | {"row": one.row.as_dict(), "ok": one.ok} for one in _finite(results)]},
        skipped=skipped,
        wrong=tuple(f"{one.row.describe()}: {_why(one)}" for one in results if not one.ok),
    )


def _rows(results: Sequence[Result]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            str(one.row.processes),
            one.row.describe(),
            *(f"{distance:.1e}" for distance in (one.loss_rel, one.grad_rel, one.weight_rel)),
            "equal" if one.ok else "WRONG",
        )
        for one in results
    )


def _finite(results: Sequence[Result]) -> list[Result]:
    """Those that ran to their end: JSON has no infinity, and the others are in ``wrong`` with the reason."""
    return [one for one in results if one.error is None]


def _why(result: Result) -> str:
    if result.error is not None:
        return result.error.strip().splitlines()[-1]
    return f"loss {result.loss_rel:.1e}, gradients {result.grad_rel:.1e}, weights {result.weight_rel:.1e}"
