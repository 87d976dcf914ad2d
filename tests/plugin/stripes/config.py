"""The numbers of stripes; imports no torch, because recipes are checked before anything else is loaded."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive


@dataclass(frozen=True, config=STRICT)
class Config:
    kernel_role: ClassVar[None] = None

    rows: Positive = 16
    channels: Positive = 6

    @property
    def output_tokens(self) -> int:
        return self.rows

    @property
    def output_channels(self) -> int:
        return self.channels

    def check_tile_size(self, tile_size: int) -> None:
        if tile_size % self.rows:
            raise ValueError(f"tile_size={tile_size} cannot be cut into rows={self.rows} stripes")

    def check_tensor_parallel(self, tp: int) -> None:
        """Every process has the whole layer."""
