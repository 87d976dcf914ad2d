"""The report's charts: plain functions from records to SVG text, with no global matplotlib state and no display."""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megatron_eagle.demo.summary import TaskScore
from megatron_eagle.runs.charts import BLUE, GREY, INK, MUTED, PALE_BLUE, STYLE, running_mean, svg
from megatron_eagle.training.log import StepRecord


def loss_chart(metrics: Mapping[str, Sequence[StepRecord]]) -> str:
    """Loss of all stages on one time axis: every step pale, a running mean on top, a border where a stage begins."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        axes = figure.subplots()
        start = 0
        for stage, records in metrics.items():
            end = start + records[-1].step
            centre = (start + end) / 2
            axes.text(centre, 1.02, stage, transform=axes.get_xaxis_transform(), ha="center", color=MUTED, fontsize=9)
            start = end
        _by_stage(axes, metrics, lambda record: record.loss, smooth=True)
        axes.set_ylabel("loss")
        axes.set_xlabel("step, counted over all stages")
        axes.set_ylim(bottom=0)
        return svg(figure)


def score_chart(metrics: Mapping[str, Sequence[StepRecord]]) -> str | None:
    """Scores of the evaluations while training, a line each, on the axis of the losses; None if there were none."""
    points: dict[str, list[tuple[int, float]]] = {}
    start = 0
    for records in metrics.values():
        for record in records:
            for name, score in record.scores.items():
                points.setdefault(name, []).append((start + record.step, score))
        start += records[-1].step
    if not points:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for name, line in points.items():
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1.6, label=name)
        axes.set_xlim(0, start)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("step, counted over all stages")
        axes.legend(frameon=False)
        return svg(figure)


def rate_chart(metrics: Mapping[str, Sequence[StepRecord]]) -> str:
    """Learning rate, gradient norm and useful tokens a second, side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        learning_rate, grad_norm, speed = figure.subplots(1, 3)
        _by_stage(learning_rate, metrics, lambda record: record.learning_rate, smooth=False)
        learning_rate.set_title("Learning rate")
        learning_rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value else "0"))
        _by_stage(grad_norm, metrics, lambda record: record.grad_norm, smooth=True)
        grad_norm.set_title("Gradient norm before clipping")
        _by_stage(speed, metrics, lambda record: record.useful_tokens_per_second, smooth=True)
        speed.set_title("Useful tokens a second")
        speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axes in (learning_rate, grad_norm, speed):
            axes.set_ylim(bottom=0)
            axes.set_xlabel("step")
        return svg(figure)


def fill_chart(metrics: Mapping[str, Sequence[StepRecord]]) -> str:
    """How full the packs were: a histogram of the steps by the useful share of their tokens."""
    fills = [1 - record.padding_fraction for records in metrics.values() for record in records]
    lowest = min(0.9, math.floor(min(fills) * 20) / 20)
    bins = [lowest + (1 - lowest) * index / 20 for index in range(21)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.hist(fills, bins=bins, color=BLUE, edgecolor="white", linewidth=0.8)
        axes.set_xlim(lowest, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("useful share of a step's tokens")
        axes.set_ylabel("steps")
        axes.grid(axis="x", visible=False)
        return svg(figure)


def accuracy_chart(scores: Sequence[TaskScore]) -> str:
    """Two bars a task: right answers with the images, and with every image blanked."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.55 + 0.52 * len(scores)), layout="constrained")
        axes = figure.subplots()
        for row, score in enumerate(scores):
            for offset, share, colour in ((-0.19, score.accuracy, BLUE), (0.19, score.blank_accuracy, GREY)):
                axes.barh(row + offset, share, height=0.34, color=colour)
                axes.text(share + 0.012, row + offset, f"{100 * share:.0f}", va="center", color=INK, fontsize=8.5)
        axes.set_yticks(range(len(scores)), [score.task for score in scores])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(scores) - 0.45, -0.55)
        axes.set_xlim(0, 1.06)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y", visible=False)
        return svg(figure)


def _by_stage(
    axes: Axes, metrics: Mapping[str, Sequence[StepRecord]], number: Callable[[StepRecord], float], *, smooth: bool
) -> None:
    """Draw one number of every stage, one stage after another, with a border where the next one begins."""
    start = 0
    for records in metrics.values():
        steps = [start + record.step for record in records]
        values = [number(record) for record in records]
        axes.plot(steps, values, color=PALE_BLUE if smooth else BLUE, linewidth=1.0 if smooth else 1.6)
        if smooth:
            window = 2 * (len(values) // 30) + 3
            axes.plot(steps, running_mean(values, window), color=BLUE, linewidth=1.8)
        if start:
            axes.axvline(start + 0.5, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
        start += records[-1].step
    axes.set_xlim(0, start)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
