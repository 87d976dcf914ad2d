"""summary.json: what a finished demo run says about itself, for scripts and for the report.

The dataclasses below are the file's schema; nothing is written that is not a field here.

``loss_first`` and ``loss_last`` are means over a window of steps at either end of a stage, because a single step's
loss depends on the samples it drew: 5 steps, or half of the stage if it has fewer than 10, so that the windows never
overlap.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_eagle.errors import UserError
from megatron_eagle.training.log import StepRecord

SUMMARY_FILE = "summary.json"
LOSS_WINDOW = 5


@dataclass(frozen=True)
class Example:
    """One held-out question and what the model said.

    images: PNG files, in the order of the question's ``<image>`` markers; empty for a text-only question.
    prediction, blank_prediction: the answer with the images and with every image blanked.
    correct, blank_correct: the evaluation's verdict on each.
    """

    task: str
    question: str
    answer: str
    prediction: str
    blank_prediction: str
    correct: bool
    blank_correct: bool
    images: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class StageSummary:
    """One stage: its steps, its loss at either end (see the module's docstring) and how many parameters it trained."""

    name: str
    steps: int
    loss_first: float
    loss_last: float
    trainable_parameters: int

    @classmethod
    def of(cls, records: Sequence[StepRecord], trainable_parameters: int) -> "StageSummary":
        """Summary of a stage's records, which must be in the order of their steps."""
        if not records:
            raise ValueError("a stage without any step has no summary")
        window = loss_window(len(records))
        return cls(
            name=records[0].stage,
            steps=records[-1].step,
            loss_first=math.fsum(record.loss for record in records[:window]) / window,
            loss_last=math.fsum(record.loss for record in records[-window:]) / window,
            trainable_parameters=trainable_parameters,
        )


@dataclass(frozen=True)
class LayoutSummary:
    """Processes along each axis and in all."""

    tp: int
    pp: int
    cp: int
    dp: int
    world: int

    def __post_init__(self) -> None:
        if self.tp * self.pp * self.cp * self.dp != self.world:
            raise ValueError(
                f"tp={self.tp} x pp={self.pp} x cp={self.cp} x dp={self.dp} is not a world of {self.world} processes"
            )


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, 0 to 1, over the held-out split: all, by task, and all with every image blanked."""

    overall: float
    per_task: dict[str, float]
    blank_images: float

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Accuracy":
        """Accuracy over all held-out examples, every example counting once."""
        scores = task_scores(examples)
        asked = sum(score.asked for score in scores)
        if asked == 0:
            raise ValueError("accuracy of 0 examples")
        return cls(
            overall=sum(score.right for score in scores) / asked,
            per_task={score.task: score.accuracy for score in scores},
            blank_images=sum(score.right_blank for score in scores) / asked,
        )


@dataclass(frozen=True)
class StageSeconds:
    """Wall-clock seconds of the parts of the run."""

    setup: float
    train: float
    evaluate: float


@dataclass(frozen=True)
class Summary:
    """The whole file. padding_fraction: padding's share of all tokens trained on, 0 to 1.

    peak_rss_gb: largest resident memory of the run's processes together, in units of 1e9 bytes.
    """

    stages: list[StageSummary]
    layout: LayoutSummary
    padding_fraction: float
    accuracy: Accuracy
    seconds: StageSeconds
    peak_rss_gb: float

    def write(self, folder: Path) -> Path:
        """Write ``folder/summary.json`` and return its path; UserError if it cannot be written."""
        path = folder / SUMMARY_FILE
        try:
            path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path


@dataclass(frozen=True)
class TaskScore:
    """How many questions of a task were asked and answered rightly, with the images and with them blanked."""

    task: str
    asked: int
    right: int
    right_blank: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def blank_accuracy(self) -> float:
        return self.right_blank / self.asked


def task_scores(examples: Iterable[Example]) -> list[TaskScore]:
    """Scores by task, in alphabetical order."""
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    return [
        TaskScore(task, len(group), sum(one.correct for one in group), sum(one.blank_correct for one in group))
        for task, group in sorted(by_task.items())
    ]


def padding_fraction(records: Iterable[StepRecord]) -> float:
    """Padding's share of all tokens of these steps, 0 to 1."""
    useful, total = 0, 0
    for record in records:
        useful += record.useful_tokens
        total += record.tokens
    if total == 0:
        raise ValueError("padding of 0 tokens")
    return 1 - useful / total


def loss_window(steps: int) -> int:
    """Steps averaged at either end of a stage of so many steps."""
    return min(LOSS_WINDOW, max(1, steps // 2))
