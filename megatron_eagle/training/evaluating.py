"""When a stage that trains is evaluated, and when its scores end it.

What is asked and how answers are scored is for who starts the training to say (``evaluation/while_training.py``): the
trainer hands over its engine and gets numbers.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.ending import out_of_patience
from megatron_eagle.config.evaluation import EvaluationSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine

# Scores by name, the same on every process; changes nothing that training can notice.
Evaluator = Callable[[Engine], Mapping[str, float]]
# Also: the run's folder, and what is called whenever something is answered.
MakeEvaluator = Callable[[Recipe, Stage, Groups, Platform, Path, Callable[[], None]], Evaluator]


@dataclass(frozen=True)
class Scores:
    """by_name: each between 0 and 1; none if nothing was asked. seconds: what that took."""

    by_name: Mapping[str, float]
    seconds: float = 0.0

    def best_by(self, name: str | None) -> float:
        """What a checkpoint is the best by: the score of that name, None for the mean of all; there must be one."""
        return self.by_name[name] if name else sum(self.by_name.values()) / len(self.by_name)


@dataclass
class Scored:
    """What a stage's evaluations came to so far, also those of earlier starts, which checkpoints carry on.

    best: the highest score, if there was one; by: which score that is, in words, None in checkpoints before 2026-11-26.
    waited: how many evaluations have come since, none higher.
    """

    best: float | None = None
    waited: int = 0
    by: str | None = None


@dataclass
class Evaluation:
    """The evaluations of a stage of so many steps; ``scored`` is kept up to date."""

    settings: EvaluationSettings
    steps: int
    evaluate: Evaluator
    scored: Scored

    def due(self, step: int) -> bool:
        """Whether the model is asked after ``step``."""
        return step % self.settings.every == 0 or step == self.steps

    def run(self, engine: Engine) -> Scores:
        """Ask, and count whether that was the best so far; every process calls this after the same step."""
        started = time.perf_counter()
        by_name = self.evaluate(engine)
        scores = Scores(by_name, time.perf_counter() - started)
        score = self.score_of(scores)
        if self.scored.best is None or score > self.scored.best:
            self.scored.best, self.scored.waited = score, 0
        else:
            self.scored.waited += 1
        self.scored.by = self.settings.by
        return scores

    def score_of(self, scores: Scores) -> float:
        """What a checkpoint is the best by."""
        return scores.best_by(self.settings.best_by)

    @property
    def out_of_patience(self) -> bool:
        """Whether the stage is over, however many steps are left."""
        return out_of_patience(self.scored.waited, self.settings.patience)
