"""The table of ``megatron-eagle verify``: a line a row while it runs, then ``verify.json`` and ``verify.md``."""

import json
import platform
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from megatron_eagle.config.recipe import Recipe
from megatron_eagle.errors import UserError
from megatron_eagle.model.build_context import Kernels
from megatron_eagle.progress import Progress
from megatron_eagle.verification.check import TOLERANCES, Result, Verifier
from megatron_eagle.verification.rows import Row, quick_table, whole_table
from megatron_eagle.verification.subject import Subject, packs_of_a_step, recipe_rows, recipe_subject

QUICK_PROCESSES = 4
ALL_PROCESSES = 8


def verify(
    *,
    quick: bool,
    processes: int | None,
    out: Path | None,
    kernels: Kernels = "torch",
    lora: bool = False,
    sample: int | None = None,
    seed: int = 0,
) -> None:
    """Run the table on this machine, print it, write it to ``out``; UserError if any row is off.

    lora: every row trains adapters, against PEFT's. sample: so many rows of the table instead of all, drawn with
    ``seed``.
    """
    most = largest_world(processes or (QUICK_PROCESSES if quick else ALL_PROCESSES))
    rows = quick_table(most) if quick else whole_table(most)
    if sample is not None and sample < len(rows):
        rows = sorted(random.Random(seed).sample(rows, sample), key=lambda row: row.processes)
    _run(_with_kernels([replace(row, lora=lora) for row in rows], kernels), None, out)


def verify_recipe(
    recipe: Recipe, *, processes: int | None, out: Path | None, kernels: Kernels = "torch", lora: bool = False
) -> None:
    """The same for the layouts and the data of a user's recipe, at reduced width (``subject.py``).

    lora: train adapters, of numbers of the table's own; a recipe that has ``lora`` does without being told.
    """
    most = largest_world(processes or ALL_PROCESSES)
    stage = recipe.stages[0]
    rows = recipe_rows(recipe, packs_of_a_step(recipe, stage))
    fitting = [row for row in rows if row.processes <= most]
    if not fitting:
        smallest = min(row.processes for row in rows)
        raise UserError(f"the recipe's layouts need {smallest} processes, at most {most} are allowed; see --processes")
    adapted = lora or recipe.lora is not None
    rows = _with_kernels([replace(row, lora=adapted) for row in fitting], kernels)
    _run(rows, recipe_subject(recipe, stage), out)


def largest_world(wanted: int) -> int:
    """``wanted`` processes, or one for each GPU if those are fewer: two cannot share one under NCCL."""
    return min(wanted, torch.cuda.device_count()) if torch.cuda.is_available() else wanted


def _with_kernels(rows: Sequence[Row], kernels: Kernels) -> list[Row]:
    if kernels == "triton" and not torch.cuda.is_available():
        from eagle_kernels.device import INTERPRETED  # imports Triton, which only this needs

        if not INTERPRETED:
            raise UserError(
                "on a CPU Triton's kernels have to be interpreted: put "
                "TRITON_INTERPRET=1 in front of the command (about a minute a row)"
            )
    return [replace(row, kernels=kernels) for row in rows]


def _run(rows: Sequence[Row], subject: Subject | None, out: Path | None) -> None:
    most = max(row.processes for row in rows)
    print(f"{len(rows)} rows of up to {most} processes against one plain float64 process; distances are relative")
    print(_line("processes", "layout and options", "loss", "gradients", "weights", "seconds", ""))
    with Verifier(subject) as verifier, Progress("rows", total=len(rows), unit="rows") as bar:

        def show(result: Result) -> None:
            bar.say(_row_line(result))
            bar.update()

        results = verifier.check_all(rows, show)
    if out is not None:
        _write(out, results)
    wrong = [result for result in results if not result.ok]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(results)} rows differ from the reference, the first is: {wrong[0].row.describe()}"
        )
    print(f"all {len(results)} rows equal the reference; {_said_tolerances()}")


def _said_tolerances() -> str:
    parts = (
        f"{name}: loss {limit.loss:g}, gradients {limit.gradient:g}, weights {limit.weight:g}"
        for name, limit in TOLERANCES.items()
    )
    return "tolerances " + "; ".join(parts)


def _row_line(result: Result) -> str:
    loss, gradients, weights = (f"{x:.1e}" for x in (result.loss_rel, result.grad_rel, result.weight_rel))
    line = _line(
        str(result.row.processes),
        result.row.describe(),
        loss,
        gradients,
        weights,
        f"{result.seconds:.1f}",
        "" if result.ok else "WRONG",
    )
    return line if result.error is None else f"{line}\n{result.error}"


def _line(processes: str, layout: str, loss: str, gradients: str, weights: str, seconds: str, verdict: str) -> str:
    return f"{processes:>9}  {layout:<88}  {loss:>8}  {gradients:>9}  {weights:>8}  {seconds:>7}  {verdict}".rstrip()


def _write(out: Path, results: Sequence[Result]) -> None:
    rows = [
        {
            "layout": _named(result.row),
            "loss_rel": result.loss_rel,
            "grad_rel": result.grad_rel,
            "weight_rel": result.weight_rel,
            "ok": result.ok,
            "seconds": round(result.seconds, 2),
        }
        for result in results
    ]
    versions = {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions,
        "tolerances": {name: asdict(limit) for name, limit in TOLERANCES.items()},
        "rows": rows,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A row that could not be run has infinite distances, which JSON spells as null.
        text = json.dumps(report, indent=1, allow_nan=True).replace("Infinity", "null")
        (out / "verify.json").write_text(text + "\n", encoding="utf-8")
        (out / "verify.md").write_text(_markdown(results), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _named(row: Row) -> dict[str, object]:
    named = row.as_dict()
    named["encoder placement"] = named.pop("encoder")
    return named


def _markdown(results: Sequence[Result]) -> str:
    lines = ["| processes | layout and options | loss | gradients | weights | |", "|---|---|---|---|---|---|"]
    for result in results:
        numbers = " | ".join(f"{x:.1e}" for x in (result.loss_rel, result.grad_rel, result.weight_rel))
        verdict = "equal" if result.ok else "WRONG"
        lines.append(f"| {result.row.processes} | {result.row.describe()} | {numbers} | {verdict} |")
    return "\n".join(lines) + "\n"
