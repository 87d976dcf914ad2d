"""report.html: one page that shows a person what a demo run learnt, from its summary, its metrics and its answers.

The page holds its pictures itself and links to nothing, so it can be mailed or kept as a CI artefact. It is laid out by
``report.html.j2``; the charts come from ``charts.py``; this module chooses what is shown and in what words.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_eagle.demo import charts
from megatron_eagle.demo.summary import LOSS_WINDOW, Accuracy, Example, Summary, task_scores
from megatron_eagle.pages import data_uri, render, write
from megatron_eagle.training.log import StepRecord, format_duration

REPORT_FILE = "report.html"
SHOWN_PER_TASK = 3
_PACKAGES = ("megatron-eagle", "torch", "megatron-core", "megatron-energon", "transformers", "triton")


@dataclass(frozen=True)
class TaskExamples:
    """The examples of one task that the page shows."""

    task: str
    examples: list[Example]


def write_report(
    folder: Path, summary: Summary, metrics: Mapping[str, Sequence[StepRecord]], examples: Sequence[Example]
) -> Path:
    """Write ``folder/report.html`` and return its path.

    metrics: the records of every stage, in the order the stages ran (``training.log.read_metrics``).
    examples: all held-out questions with their answers; the tables count all, the page shows a few of each task.

    Raises ValueError if the summary's accuracy is not that of the examples, UserError if the page cannot be written.
    """
    if summary.accuracy != Accuracy.of(examples):
        raise ValueError(f"summary says {summary.accuracy}, the {len(examples)} examples give {Accuracy.of(examples)}")
    if list(metrics) != [stage.name for stage in summary.stages] or not all(metrics.values()):
        raise ValueError(
            f"summary has stages {[stage.name for stage in summary.stages]}, "
            f"the metrics {[(stage, len(records)) for stage, records in metrics.items()]} (stage, steps)"
        )
    scores = task_scores(examples)
    page = render(
        "megatron_eagle.demo:report.html.j2",
        name=folder.resolve().name,
        summary=summary,
        scores=scores,
        asked=len(examples),
        loss_window=LOSS_WINDOW,
        shown=choose_examples(examples),
        shown_per_task=SHOWN_PER_TASK,
        rejected=sum(records[-1].rejected_total for records in metrics.values()),
        loss_chart=charts.loss_chart(metrics),
        rate_chart=charts.rate_chart(metrics),
        score_chart=charts.score_chart(metrics),
        fill_chart=charts.fill_chart(metrics),
        accuracy_chart=charts.accuracy_chart(scores),
        versions=installed_versions(),
        percent=_percent,
        duration=format_duration,
        svg=lambda text: data_uri("image/svg+xml", text.encode()),
        png=lambda content: data_uri("image/png", content),
    )
    path = folder / REPORT_FILE
    write(page, path)
    return path


def choose_examples(examples: Sequence[Example]) -> list[TaskExamples]:
    """The first few examples of each task, in held-out order; tasks in alphabetical order.

    If those were all answered rightly (or all wrongly) and the task has one with the other verdict, the first such
    example takes the last place: a reader should see how a task fails as well as how it succeeds.
    """
    chosen = []
    for task in sorted({example.task for example in examples}):
        group = [example for example in examples if example.task == task]
        shown, rest = group[:SHOWN_PER_TASK], group[SHOWN_PER_TASK:]
        verdicts = {example.correct for example in shown}
        other = next((example for example in rest if example.correct not in verdicts), None)
        if other is not None:
            shown[-1] = other
        chosen.append(TaskExamples(task, shown))
    return chosen


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"
