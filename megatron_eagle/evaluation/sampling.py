"""Which token follows: the most likely one, or one drawn by temperature and top-p.

What is drawn depends on the seed, the question and the place in its answer only, never on a random state: the same
answers whatever is asked beside a question, on every process, and no draw of training's is taken.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 for the most likely token. top_p: of the likeliest tokens that together reach it, one is drawn
    ("The Curious Case of Neural Text Degeneration"); the one that reaches it is among them."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, it must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, it must be above 0 and at most 1")

    @property
    def record(self) -> dict[str, Any]:
        """What results say of it; nothing of the likeliest token, the default."""
        return {"sampling": asdict(self)} if self.temperature else {}

    def choose(self, logits: Tensor, places: Sequence[tuple[str, int]]) -> Tensor:
        """int64 [n] of ``logits`` [n, vocabulary]; places: each row's question and the number of its token."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        likely = (logits.double() / self.temperature).softmax(dim=-1)
        likely, tokens = likely.sort(dim=-1, descending=True, stable=True)
        reached = likely.cumsum(dim=-1)
        likely = likely.masked_fill(reached - likely >= self.top_p, 0.0)
        reached = likely.cumsum(dim=-1)
        drawn = torch.tensor([[self._draw(*place)] for place in places], dtype=torch.float64, device=logits.device)
        chosen = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)
        # Behind the kept tokens nothing is reached any more: a draw rounded up to the whole takes the last of them.
        return tokens.gather(1, chosen.clamp(max=(likely > 0).sum(dim=-1, keepdim=True) - 1))[:, 0]

    def _draw(self, question: str, number: int) -> float:
        """Uniform in [0, 1), the same wherever it is asked for."""
        digest = hashlib.sha256(f"{self.seed}\n{number}\n{question}".encode("utf-8", "backslashreplace")).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)


GREEDY = Sampling()
