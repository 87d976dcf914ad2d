"""The data part of a recipe: which data sets in which proportion, and how samples become packs.

Numbers and checks only, no I/O; ``energon.py`` and ``stream.py`` read them.
"""

import math
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic.dataclasses import dataclass

from megatron_eagle.data.conversation import DEFAULT_SYSTEM
from megatron_eagle.data.images import MAX_PIXELS
from megatron_eagle.data.tiling import Tiling
from megatron_eagle.layout import STRICT, Positive


@dataclass(frozen=True, config=STRICT)
class Source:
    """One data set made by ``megatron-eagle data build``.

    weight: share of the samples drawn from it, relative to the other sources' weights.
    """

    path: str
    weight: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """How a stream of packs is made.

    pack_length: tokens of a pack, padding included.
    tile_size, min_tiles, max_tiles, tiling_rule: see ``tiling.Tiling``.
    tokens_per_tile: tokens a tile becomes; follows from the encoders (Eagle: 256).
    max_tiles_per_pack: optional second bound of a pack, for the encoders' memory.
    system: system turn of conversations that bring none; empty for no such turn.
    packing: ``balanced`` or ``best_fit`` (see ``packing.py``).
    packing_buffer: samples looked at together when packs are chosen, per reader process.
    packing_delta: packs more than a buffer needs, ``balanced`` only; None: 1 in 50, measured to cost the least
        padding that still spreads long samples. Eagle uses 20 on buffers of thousands.
    shuffle_buffer: samples a draw is taken from, per reader process.
    max_samples_per_sequence: samples read one after another before another place of the shards is drawn.
    max_pixels: images above it are rejected as decompression bombs.
    max_rejected_in_a_row: samples rejected one after another, without a good one, that stop the run.
    """

    sources: tuple[Source, ...]
    pack_length: Positive
    tile_size: Positive = 448
    tokens_per_tile: Positive = 256
    min_tiles: Positive = 1
    max_tiles: Positive = 12
    tiling_rule: Literal["eagle2", "area"] = "eagle2"
    max_tiles_per_pack: Positive | None = None
    system: str = DEFAULT_SYSTEM
    packing: Literal["balanced", "best_fit"] = "balanced"
    packing_buffer: Positive = 512
    packing_delta: Annotated[int, Ge(0)] | None = None
    shuffle_buffer: Positive = 1000
    max_samples_per_sequence: Positive = 100
    max_pixels: Positive = MAX_PIXELS
    max_rejected_in_a_row: Positive = 1000

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a stream needs at least one source, these settings have 0")
        if self.tokens_per_tile > self.pack_length:
            raise ValueError(f"a tile of {self.tokens_per_tile} tokens does not fit into a pack of {self.pack_length}")
        if self.packing_delta is not None and self.packing == "best_fit":
            raise ValueError(f"packing_delta={self.packing_delta} belongs to packing=balanced, this is best_fit")
        _ = self.tiling

    @cached_property
    def tiling(self) -> Tiling:
        return Tiling(self.tile_size, self.min_tiles, self.max_tiles, self.tiling_rule)

    def spare_packs(self, needed: int) -> int:
        """Packs to offer beyond the ``needed`` ones."""
        return math.ceil(needed / 50) if self.packing_delta is None else self.packing_delta
