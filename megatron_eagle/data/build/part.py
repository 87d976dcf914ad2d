"""A part of work that many processes or machines share, each starting its own by itself."""

from dataclasses import dataclass

from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Part:
    """Part ``number``, from 1, of ``parts`` that share one work."""

    number: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.parts:
            raise UserError(
                f"part {self.number}/{self.parts} must be between 1/{self.parts} and {self.parts}/{self.parts}"
            )
