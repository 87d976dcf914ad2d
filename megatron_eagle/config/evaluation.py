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
    limit: how many questions of each are asked, its first ones; null for all.
    answer_tokens: longest answer.
    keep: ``best`` also keeps the checkpoint with the highest mean score, beside the newest ones.
    """

    every: Positive
    data: tuple[str, ...]
    limit: Positive | None = 200
    answer_tokens: Positive = 16
    keep: Literal["newest", "best"] = "newest"

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("evaluation has no questions: data is empty")
        names = [Path(folder).name for folder in self.data]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluation.data has two folders called {', '.join(twice)}: scores go by that name")

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
