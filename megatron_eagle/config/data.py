"""The data part of a recipe: which data sets in which proportion, and how samples become packs.

Numbers and checks only, no I/O; ``energon.py`` and ``streams.py`` read them.
"""

import math
from dataclasses import field
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT, Positive
from megatron_eagle.config.packing_rules import PackingName
from megatron_eagle.data.media.frames import VideoSettings
from megatron_eagle.data.media.images import MAX_PIXELS
from megatron_eagle.data.media.tiling import Tiling
from megatron_eagle.data.sample.conversation import DEFAULT_SYSTEM


@dataclass(frozen=True, config=STRICT)
class BlendSource:
    """One data set made by ``megatron-eagle data build``.

    weight: share of the samples drawn from it, relative to the other sources' weights.
    repeat: instead of a weight, how often an epoch holds each of its samples (Eagle's ``repeat_time``); with 0.5 two
        epochs hold each once. ``order=planned`` only.
    """

    path: str
    weight: Annotated[float, Gt(0)] = 1.0
    repeat: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.repeat is not None and self.weight != 1.0:
            raise ValueError(f"{self.path} has weight={self.weight} and repeat={self.repeat}; give one of them")


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """How a stream of packs is made.

    pack_length: tokens of a pack, padding included.
    tile_size, min_tiles, max_tiles, tiling_rule: see ``tiling.Tiling``.
    tokens_per_tile: tokens a tile becomes; follows from the encoders (Eagle: 256).
    max_tiles_per_pack: optional second bound of a pack, for the encoders' memory.
    system: system turn of conversations that bring none; empty for no such turn.
    order: ``planned``: all lengths are known beforehand and the order of packs is a function of seed and step alone
        (``planned.py``). ``buffer``: Energon reads on and packs what its buffers hold (``streams.py``).
    packing: name of a rule of ``data/order/rules``: ``balanced``, ``best_fit``, ...
    packing_delta: packs more than the samples need, ``balanced`` only. None: of a buffer 1 in 50, measured to cost the
        least padding that still spreads long samples; of a plan 1 in 500. Eagle uses 20 on thousands.
    degrade: show a sample that is too long with fewer frames and tiles instead of rejecting it (``budget.py``).
    decoder: ``pillow``, or ``dali``: plain JPEGs by NVIDIA DALI, on the GPU with workers 0, otherwise by its CPU mode
        (``dali.py``); ``planned`` only.
    video: which frames of videos are shown, and in what words (``frames.VideoSettings``).
    plan_window: ``planned`` only: samples that are packed together; a smaller epoch is packed whole.
    attention_parity: ``planned`` only: length of a segment, in tokens, at which attention costs the language model as
        much as all the rest of it; decides which rank gets which packs of a step. hidden, L layers and N parameters
        without embeddings give N / (L x hidden): 65 000 for Qwen2.5-7B, 17 000 for 0.5B.
    tile_cost: ``planned`` only: cost of encoding a tile, in tokens of the language model; 0 if encoders are spread.
    reader_timeout: ``planned`` only: seconds that a pack may take a reader process before the run stops.
    packing_buffer: ``buffer`` only, as the next two: samples looked at together when packs are chosen, per process.
    shuffle_buffer: samples a draw is taken from, per reader process.
    max_samples_per_sequence: samples read one after another before another place of the shards is drawn.
    max_pixels: images above it are rejected as decompression bombs.
    max_rejected_in_a_row: samples rejected one after another, without a good one, that stop the run.
    """

    sources: tuple[BlendSource, ...]
    pack_length: Positive
    tile_size: Positive = 448
    tokens_per_tile: Positive = 256
    min_tiles: Positive = 1
    max_tiles: Positive = 12
    tiling_rule: Literal["eagle2", "area"] = "eagle2"
    max_tiles_per_pack: Positive | None = None
    system: str = DEFAULT_SYSTEM
    order: Literal["planned", "buffer"] = "planned"
    packing: PackingName = "balanced"
    packing_delta: Annotated[int, Ge(0)] | None = None
    degrade: bool = False
    decoder: Literal["pillow", "dali"] = "pillow"
    video: VideoSettings = field(default_factory=VideoSettings)
    plan_window: Positive = 1_000_000
    attention_parity: Positive = 65_000
    tile_cost: Annotated[float, Ge(0)] = 0.0
    reader_timeout: Positive = 600
    packing_buffer: Positive = 512
    shuffle_buffer: Positive = 1000
    max_samples_per_sequence: Positive = 100
    max_pixels: Positive = MAX_PIXELS
    max_rejected_in_a_row: Positive = 1000

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a stream needs at least one source, these settings have 0")
        if self.tokens_per_tile > self.pack_length:
            raise ValueError(f"a tile of {self.tokens_per_tile} tokens does not fit into a pack of {self.pack_length}")
        if self.packing_delta is not None and self.packing != "balanced":
            raise ValueError(f"packing_delta={self.packing_delta} belongs to packing=balanced, this is {self.packing}")
        if len({source.repeat is None for source in self.sources}) > 1:
            raise ValueError("some sources have a repeat and others do not; give all of them one, or none")
        if self.order == "buffer" and self.decoder == "dali":
            raise ValueError("decoder=dali needs order=planned")
        if self.order == "buffer" and self.sources[0].repeat is not None:
            raise ValueError("repeat needs order=planned; order=buffer draws by weight")
        _ = self.tiling

    @cached_property
    def tiling(self) -> Tiling:
        return Tiling(self.tile_size, self.min_tiles, self.max_tiles, self.tiling_rule)

    def spare_packs(self, needed: int) -> int:
        """Packs to offer beyond the ``needed`` ones."""
        if self.packing_delta is not None:
            return self.packing_delta
        return needed // 500 if self.order == "planned" else math.ceil(needed / 50)
