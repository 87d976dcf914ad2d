"""How charts of this project look, and those of runs beside one another: functions from records to a figure."""

import io
import math
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_eagle.runs.found import Run
from megatron_eagle.training.log import StepRecord

BLUE, PALE_BLUE, GREY, INK, MUTED, LINE = "#1d5fa6", "#a9c7e8", "#98a2ad", "#1b2430", "#55606c", "#d9dee4"
# Told apart also without colours, by their lightness; after six runs they come again, dashed.
SERIES = ("#1d5fa6", "#d1641a", "#2f8f5b", "#a03a8c", "#7a6a00", "#5b6472")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "grid.color": "#eceff2",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    # A task or stage may be called anything; without this a dollar sign would start a formula.
    "text.parse_math": False,
    # Letters become outlines, so that the page looks the same on a machine without the font; a fixed salt makes the
    # same numbers give the same file.
    "svg.fonttype": "path",
    "svg.hashsalt": "megatron-eagle",
}


def comparison(runs: Sequence[Run]) -> Figure:
    """A row for each stage that any run has: loss and useful tokens a second of all runs, over one another."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.metrics))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9 * len(stages)), layout="constrained")
        rows = figure.subplots(len(stages), 2, squeeze=False)
        for (loss, speed), stage in zip(rows, stages, strict=True):
            _overlay(loss, runs, stage, lambda record: record.loss)
            loss.set_title(f"{stage}: loss")
            _overlay(speed, runs, stage, lambda record: record.useful_tokens_per_second)
            speed.set_title(f"{stage}: useful tokens a second")
            speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            speed.set_ylim(bottom=0)
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(runs)), frameon=False)
        return figure


def _overlay(axes: Axes, runs: Sequence[Run], stage: str, number: Callable[[StepRecord], float]) -> None:
    """A pale line of every step with its running mean on top, for each run that has the stage."""
    for place, run in enumerate(runs):
        records = run.metrics.get(stage, [])
        colour, dashes = SERIES[place % len(SERIES)], "-" if place < len(SERIES) else "--"
        steps, values = [record.step for record in records], [number(record) for record in records]
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        smooth = running_mean(values, 2 * (len(values) // 30) + 1)
        axes.plot(steps, smooth, dashes, color=colour, linewidth=1.7, label=run.name)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the ``window`` (odd) values around each; near the ends over those of them that exist."""
    half = window // 2
    parts = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same numbers."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()
