"""What a stream of packs is made of: a stage's data sets, how they are read, and what follows from model and layout.

Numbers and checks only, no I/O; ``data/order`` and ``data/stream`` read them. ``Recipe.data_settings`` makes them.
"""

from dataclasses import asdict, field
from functools import cached_property
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Positive
from megatron_eagle.config.pack_costs import PackCosts
from megatron_eagle.config.reading import ReadingSettings, Tiling


@dataclass(frozen=True, config=STRICT)
class BlendSource:
    """One data set made by ``megatron-eagle data build``.

    path: its folder.
    weight: share of the samples drawn from it, relative to the other sources' weights.
    repeat: instead of a weight, how often an epoch holds each of its samples (Eagle's ``repeat_time``); with 0.5 two
        epochs hold each once. ``order=planned`` only.
    """

    path: str
    weight: AboveZero = 1.0
    repeat: AboveZero | None = None

    def __post_init__(self) -> None:
        if self.repeat is not None and self.weight != 1.0:
            raise ValueError(f"{self.path} has weight={self.weight} and repeat={self.repeat}; give one of them")


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """How the stream of packs of one stage is made.

    pack_length: tokens of a pack, padding included.
    tile_size: side of a tile, pixels; tokens_per_tile: tokens it becomes. Both follow from the encoders (Eagle: 256).
    model_costs: those of the stage's model, which hold where ``reading`` sets none.
    reading: everything else, as the recipe says it.
    """

    sources: tuple[BlendSource, ...]
    pack_length: Positive
    tile_size: Positive = 448
    tokens_per_tile: Positive = 256
    model_costs: PackCosts = field(default_factory=PackCosts)
    reading: ReadingSettings = field(default_factory=ReadingSettings)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a stream needs at least one source, these settings have 0")
        if self.tokens_per_tile > self.pack_length:
            raise ValueError(f"pack_length={self.pack_length} cannot hold one tile of {self.tokens_per_tile} tokens")
        if len({source.repeat is None for source in self.sources}) > 1:
            raise ValueError("some sources have a repeat and others do not; give all of them one, or none")
        if self.reading.order == "buffer" and self.sources[0].repeat is not None:
            raise ValueError("repeat needs order=planned; order=buffer draws by weight")

    @property
    def attention_parity(self) -> int:
        given = self.reading.attention_parity
        return self.model_costs.attention_parity if given is None else given

    @property
    def tile_cost(self) -> float:
        given = self.reading.tile_cost
        return self.model_costs.tile_cost if given is None else given

    @cached_property
    def tiling(self) -> Tiling:
        return self.reading.tiling(self.tile_size)

    def flat(self) -> dict[str, Any]:
        """All settings by name, those of ``reading`` among them, as plain data; what a stream is recognised by.

        ``workers`` is left out: it says who reads, not what.
        """
        flat = {**asdict(self), **asdict(self.reading)}
        flat |= {"attention_parity": self.attention_parity, "tile_cost": self.tile_cost}
        return {name: value for name, value in flat.items() if name not in ("reading", "model_costs", "workers")}
