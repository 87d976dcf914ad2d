"""Runs beside one another: what differs in how they were made, and in what came out; as text and as one page."""

import base64
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.pages import render, write
from megatron_eagle.planning.report import narrow
from megatron_eagle.runs.charts import comparison, svg
from megatron_eagle.runs.found import Run
from megatron_eagle.text import folded
from megatron_eagle.training.log import StepRecord, format_duration

LOSS_WINDOW = 20  # last steps that a stage's loss is the mean of
NOTHING = "-"
LONGEST = 60  # characters of a value that are shown
STAGE_HEADER = ("stage", "run", "steps", "loss", "tokens", "tokens/s", "padding", "time", "GB")


@dataclass(frozen=True)
class Comparison:
    """differences: (key, value of each run) of what differs. stages: cells under ``STAGE_HEADER``."""

    runs: tuple[Run, ...]
    differences: tuple[tuple[str, tuple[str, ...]], ...]
    stages: tuple[tuple[str, ...], ...]

    @property
    def scored(self) -> bool:
        return any(run.accuracy is not None for run in self.runs)


def compare(runs: Sequence[Run]) -> Comparison:
    """UserError unless there are two or more runs of different names."""
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise UserError(f"two or more runs of different names are compared, got {', '.join(names) or 'none'}")
    stages = dict.fromkeys(stage for run in runs for stage in run.metrics)
    rows = [_stage_row(stage, run) for stage in stages for run in runs if run.metrics.get(stage)]
    return Comparison(tuple(runs), tuple(_differences(runs)), tuple(rows))


def as_text(comparison: Comparison) -> str:
    """Two Markdown tables, which also read in a terminal."""
    names = [run.name for run in comparison.runs]
    parts = [narrow(STAGE_HEADER, comparison.stages, keep=2)]
    if comparison.scored:
        parts.append(", ".join(f"{run.name}: {_share(run.accuracy)} right" for run in comparison.runs))
    if comparison.differences:
        parts.append(narrow(["differs", *names], [[key, *values] for key, values in comparison.differences]))
    else:
        parts.append(folded("nothing differs in recipe, code, packages and machine, as far as their starts say"))
    return "\n\n".join(parts)


def write_page(found: Comparison, out: Path) -> None:
    """``out`` as one HTML page that links to nothing, and its chart as PNG beside it; UserError if it is refused."""
    figure = comparison(found.runs)
    page = render(
        "megatron_eagle.runs:compare.html.j2",
        found=found,
        header=STAGE_HEADER,
        chart=base64.b64encode(svg(figure).encode()).decode(),
        share=_share,
    )
    write(page, out)
    try:
        figure.savefig(out.with_suffix(".png"), dpi=150, facecolor="white", metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def _differences(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    facts = [run.facts() for run in runs]
    keys = sorted({key for one in facts for key in one} - {"name"})
    rows = [(key, [_written(one[key]) if key in one else NOTHING for one in facts]) for key in keys]
    return [(key, tuple(_cut(values))) for key, values in rows if len(set(values)) > 1]


def _stage_row(stage: str, run: Run) -> tuple[str, ...]:
    records: Sequence[StepRecord] = run.metrics[stage]
    last = [record.loss for record in records[-LOSS_WINDOW:]]
    tokens, useful = sum(record.tokens for record in records), sum(record.useful_tokens for record in records)
    peak = run.peak_bytes.get(stage)
    return (
        stage,
        run.name,
        f"{records[-1].step}/{records[-1].steps}",
        f"{math.fsum(last) / len(last):.4f}",
        f"{useful:,}",
        f"{statistics.median(record.useful_tokens_per_second for record in records):,.0f}",
        f"{100 * (1 - useful / tokens):.1f} %",
        format_duration(sum(record.seconds for record in records)),
        NOTHING if not peak else f"{peak / 1e9:.1f}",
    )


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(values: Sequence[str]) -> list[str]:
    """Each on ``LONGEST`` characters, from a little before where they begin to differ."""
    common = len(os.path.commonprefix(list(values)))
    if max(map(len, values)) <= LONGEST:
        return list(values)
    begin = max(0, common - LONGEST // 2)
    cut = [value[begin : begin + LONGEST] for value in values]
    return [
        f"{'...' * bool(begin)}{part}{'...' * (begin + LONGEST < len(value))}"
        for part, value in zip(cut, values, strict=True)
    ]


def _share(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"
