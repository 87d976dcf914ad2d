"""Where a model is asked, and how much may be asked of it."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, NotNegative, Positive
from megatron_eagle.errors import UserError

MILLION = 1_000_000
NO_KEY = "none"  # servers without keys take any


@dataclass(frozen=True, config=STRICT)
class Endpoint:
    """An OpenAI-compatible endpoint and one of its models.

    url: up to and with ``/v1``. key_file: holds the key and nothing else; without it the caller's key is used, if any.
    requests_a_minute, tokens_a_minute: of any 60 seconds; attempts count. null: no limit.
    cost_in, cost_out: of a million tokens read and written, in any currency. most_cost: of all answers in one folder;
        a question that might exceed it, by a guess of its tokens, is not asked.
    at_once: questions in flight. timeout: seconds without a byte after which a connection is given up.
    attempts: of one question, whatever went wrong. first_wait, longest_wait: seconds between them; each is twice the
        one before, or what the endpoint asks for, up to an hour.
    """

    url: str
    model: str
    key_file: str | None = None
    requests_a_minute: Positive | None = None
    tokens_a_minute: Positive | None = None
    cost_in: NotNegative = 0.0
    cost_out: NotNegative = 0.0
    most_cost: AboveZero | None = None
    at_once: Positive = 8
    timeout: AboveZero = 120.0
    attempts: Positive = 7
    first_wait: AboveZero = 1.0
    longest_wait: AboveZero = 60.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise ValueError(
                f"an endpoint has a url (http://HOST:PORT/v1) and a model, got {self.url!r}, {self.model!r}"
            )
        if self.most_cost is not None and not self.cost_in + self.cost_out:
            raise ValueError(
                f"most_cost is {self.most_cost:g}, and neither cost_in nor cost_out says what a token costs"
            )

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.cost_in + tokens_out * self.cost_out) / MILLION

    def key(self, given: str | None) -> str:
        """The key that is sent; UserError without its value if ``key_file`` cannot be read or is empty."""
        if self.key_file is None:
            return given or NO_KEY
        try:
            found = Path(self.key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"key_file {self.key_file}: cannot be read ({type(error).__name__})") from None
        if not found or len(found.split()) > 1:
            raise UserError(f"key_file {self.key_file} holds {len(found.split())} words, a key is one")
        return found
