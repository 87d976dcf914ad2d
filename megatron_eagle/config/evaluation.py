"""Evaluation while a stage trains: how often, on what, and whether the best checkpoint is kept."""

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT, Layout
from megatron_eagle.config.numbers import Positive


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """Questions that the trainer asks the model it trains, in the same processes and with the same weights.

    every: steps between two evaluations; the last step has one, too.
    data: data set folders made by ``data build``, each a score of its own under the folder's name.
    benchmarks: benchmarks, each a score of its own under its name; ``NAME=FILE`` as ``evaluate --benchmarks`` takes it.
    benchmark_data: folder with the files of ``benchmarks``.
    limit: how many questions of each are asked, its first ones; null for all.
    answer_tokens: longest answer to a question of ``data``; benchmarks have their own.
    keep: ``best`` also keeps the checkpoint with the highest score, beside the newest ones.
    best_by: name of the score that is meant by ``keep: best`` and ``patience``; null for the mean of all.
    patience: evaluations in a row without a higher score after which the stage ends, complete; null for never.
    """

    every: Positive
    data: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    benchmark_data: str | None = None
    limit: Positive | None = 200
    answer_tokens: Positive = 16
    keep: Literal["newest", "best"] = "newest"
    best_by: str | None = None
    patience: Positive | None = None

    def __post_init__(self) -> None:
        names = self.scores
        if not names:
            raise ValueError("evaluation has no questions: data and benchmarks are empty")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"evaluation.data and .benchmarks name {', '.join(twice)} more than once: scores go by that name"
            )
        if bool(self.benchmarks) != (self.benchmark_data is not None):
            raise ValueError("evaluation.benchmarks and .benchmark_data, the folder with their files, belong together")
        asked_for = self.keep == "best" or self.patience is not None
        if self.best_by is not None and (not asked_for or self.best_by not in names):
            raise ValueError(
                f"evaluation.best_by={self.best_by!r} needs keep: best or patience, and one of the scores "
                f"{', '.join(names)}"
            )

    @property
    def scores(self) -> list[str]:
        """Their names, in the order in which they are asked for."""
        of_benchmarks = [one.partition("=")[0].strip() for one in self.benchmarks]
        return [Path(folder).name for folder in self.data] + of_benchmarks

    @property
    def by(self) -> str:
        """Which score a checkpoint is the best by, in words."""
        return self.best_by or (f"mean of {', '.join(self.scores)}" if len(self.scores) > 1 else self.scores[0])

    def check(self, layout: Layout, pack_length: int, checkpoint_every: int) -> None:
        """ValueError if a stage of this layout cannot be evaluated while it trains."""
        if layout.vpp:
            raise ValueError(
                f"evaluation generates answers without virtual pipeline stages, the layout has vpp={layout.vpp}: "
                "leave out one of them"
            )
        if self.answer_tokens >= pack_length:
            raise ValueError(
                f"evaluation.answer_tokens={self.answer_tokens} leaves no room in a pack_length of {pack_length}"
            )
        if self.keep == "best" and self.every % checkpoint_every:
            raise ValueError(
                f"evaluation.keep: best needs a checkpoint of each step that is evaluated: every={self.every} is no "
                f"multiple of checkpoint_every={checkpoint_every}"
            )
