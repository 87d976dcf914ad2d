"""When a stage that trains is evaluated, and which of its checkpoints is the best so far.

What is asked and how answers are scored is for who starts the training to say (``evaluation/while_training.py``): the
trainer hands over its engine and gets numbers.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.checkpoint.best import forget_best_after, note_best, read_best
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.evaluation import EvaluationSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine

# Scores by name, the same on every process; changes nothing that training can notice.
Evaluator = Callable[[Engine], Mapping[str, float]]
MakeEvaluator = Callable[[Recipe, Stage, Groups, Platform], Evaluator]


@dataclass(frozen=True)
class Scores:
    """by_name: each between 0 and 1; none if nothing was asked. seconds: what that took."""

    by_name: Mapping[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The evaluations of a stage. writes: whether this process notes which checkpoint is the best."""

    settings: EvaluationSettings
    steps: int
    evaluate: Evaluator
    stage_folder: Path
    writes: bool

    def due(self, step: int) -> bool:
        """Whether the model is asked after ``step``."""
        return step % self.settings.every == 0 or step == self.steps

    def resume(self, step: int) -> None:
        """Forget a best checkpoint of later steps: they will be trained and evaluated again."""
        if self.writes:
            forget_best_after(self.stage_folder, step)

    def run(self, step: int, engine: Engine) -> Scores:
        """Ask; every process calls this after the same step."""
        started = time.perf_counter()
        scores = self.evaluate(engine)
        if self.writes and self.settings.keep == "best":
            mean = sum(scores.values()) / len(scores)
            best = read_best(self.stage_folder)
            if best is None or mean > best.score:
                note_best(self.stage_folder, step, mean)
        return Scores(scores, time.perf_counter() - started)
