"""The ``reading`` block of a recipe: every knob of the way from files to packs, written once, with its checks.

Only what a knob may be is decided here. What is done with it lies beside the pixels: ``data/media/tiling.py`` and
``data/media/frames.py`` cut pictures, ``data/order`` and ``data/stream`` make packs.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Count, Flag, NotNegative, Positive
from megatron_eagle.config.packing_rules import PackingName
from megatron_eagle.remote_code.frames_eagle import MAX_PIXELS, fill_template

DEFAULT_SYSTEM = "You are a helpful assistant."

RENAMED_RULES = {"eagle2": "ratio"}


def _refuse_old_rule(value: Any) -> Any:
    if isinstance(value, str) and value in RENAMED_RULES:
        raise ValueError(
            f"{value} is now called {RENAMED_RULES[value]} and cuts as before; released Eagle 2 and 2.5 "
            "models are read by the rule area (docs/compatibility.md)"
        )
    return value


Rule = Annotated[Literal["ratio", "area"], BeforeValidator(_refuse_old_rule)]


@dataclass(frozen=True, config=STRICT)
class Tiling:
    """How images become tiles.

    tile_size: side of a tile, pixels.
    min_tiles, max_tiles: bounds on columns x rows; the thumbnail is not counted.
    rule: ``area`` is Image Area Preservation, the rule of all released code; ``ratio`` is InternVL 1.5's, which the
        Eagle 2 paper names.
    """

    tile_size: Positive = 448
    min_tiles: Positive = 1
    max_tiles: Positive = 12
    rule: Rule = "ratio"

    def __post_init__(self) -> None:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles={self.min_tiles} is more than max_tiles={self.max_tiles}")


@dataclass(frozen=True, config=STRICT)
class VideoSettings:
    """How videos become frames.

    sampling: ``fps``: ``fps`` frames a second from the first on, at most ``max_frames``. ``uniform``: ``max_frames``
        frames, or all if there are fewer. Frames that must be fewer are spread evenly from the first to the last.
    fps: frames a second; 2 is N_max of Automatic Degrade Sampling (Eagle 2.5, section 3.2.1); the released script
        trains with 4.
    max_frames: most frames of a video.
    least_frames: a video that cannot keep so many (or all it would like to show, if that is less) is dropped (N_min).
    frame_tiles: most tiles of a frame's grid; Eagle shows frames as one tile.
    header: words before a video; they may hold its {ordinal}, {seconds}, {fps}. Formats are Python's: {seconds:.2f}.
    frame: words before each frame; they may also hold its {number} and its {time} in seconds.
    between: text between two frames. Nothing in the released training code; a line break here before 2026-11-26.
    """

    sampling: Literal["fps", "uniform"] = "fps"
    fps: AboveZero = 2.0
    max_frames: Positive = 512
    least_frames: Positive = 8
    frame_tiles: Positive = 1
    header: str = "The {ordinal} video of {seconds:.2f} seconds at {fps:.2f} fps: "
    frame: str = "Frame {number}: "
    between: str = ""

    def __post_init__(self) -> None:
        for name, template in (("header", self.header), ("frame", self.frame)):
            try:
                fill_template(template, video=0, seconds=1.0, fps=1.0, number=1, time=0.0)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise ValueError(f"video.{name}={template!r} cannot be filled in: {error!r}") from None


@dataclass(frozen=True, config=STRICT)
class ReadingSettings:
    """How samples become packs, for all stages.

    tiling_rule: ``area`` is Image Area Preservation, the rule of all released code; ``ratio`` is InternVL 1.5's, which
        the Eagle 2 paper names.
    min_tiles: least columns x rows of an image's grid; the thumbnail is not counted.
    max_tiles: most columns x rows; the thumbnail is not counted.
    max_tiles_per_pack: optional second bound of a pack, for the encoders' memory.
    system: system turn of conversations that bring none; empty for no such turn.
    order: ``planned``: all lengths are known beforehand and the order of packs is a function of seed and step alone
        (``planned.py``). ``buffer``: Energon reads on and packs what its buffers hold (``streams.py``).
    packing: a rule of ``data/order/rules``: ``balanced`` is Eagle 2's greedy knapsack; ``best_fit`` fills tighter.
    packing_delta: packs more than the samples need, ``balanced`` only. None: of a buffer 1 in 50, measured to cost the
        least padding that still spreads long samples; of a plan 1 in 500. Eagle uses 20 on thousands.
    degrade: show a sample that is too long with fewer frames and tiles instead of rejecting it (``budget.py``).
    decoder: ``pillow``, or ``dali``: plain JPEGs by NVIDIA DALI, on the GPU with workers 0, otherwise by its CPU mode
        (``dali.py``); ``planned`` only.
    video: which frames of videos are shown, and in what words.
    plan_window: ``planned`` only: samples that are packed together; a smaller epoch is packed whole.
    attention_parity: ``planned`` only: length of a segment, in tokens, at which attention costs the language model as
        much as all the rest of it; decides which rank gets which packs of a step. None: that of the model.
    tile_cost: ``planned`` only: cost of encoding a tile, in tokens of the language model; decides with
        ``attention_parity``. None: that of the model, its layout and what the stage trains.
    reader_timeout: ``planned`` only: seconds that a pack may take a reader process before the run stops.
    packing_buffer: ``buffer`` only, as the next two: samples looked at together when packs are chosen, per process.
    shuffle_buffer: samples a draw is taken from, per reader process.
    max_samples_per_sequence: samples read one after another before another place of the shards is drawn.
    max_pixels: images above it are rejected as decompression bombs.
    max_rejected_in_a_row: samples rejected one after another, without a good one, that stop the run.
    workers: processes that decode and pack beside the trainer, per data-parallel rank; 0 does it in the trainer.
    """

    tiling_rule: Rule = "ratio"
    min_tiles: Positive = 1
    max_tiles: Positive = 12
    max_tiles_per_pack: Positive | None = None
    order: Literal["planned", "buffer"] = "planned"
    packing: PackingName = "balanced"
    packing_delta: Count | None = None
    degrade: Flag = False
    decoder: Literal["pillow", "dali"] = "pillow"
    video: VideoSettings = field(default_factory=VideoSettings)
    plan_window: Positive = 1_000_000
    attention_parity: Positive | None = None
    tile_cost: NotNegative | None = None
    reader_timeout: Positive = 600
    packing_buffer: Positive = 512
    shuffle_buffer: Positive = 1000
    max_samples_per_sequence: Positive = 100
    max_pixels: Positive = MAX_PIXELS
    max_rejected_in_a_row: Positive = 1000
    system: str = DEFAULT_SYSTEM
    workers: Count = 0

    def __post_init__(self) -> None:
        if self.packing_delta is not None and self.packing != "balanced":
            raise ValueError(f"packing_delta={self.packing_delta} belongs to packing=balanced, this is {self.packing}")
        if self.order == "buffer" and self.decoder == "dali":
            raise ValueError("decoder=dali needs order=planned")
        self.tiling(tile_size=1)

    def tiling(self, tile_size: int) -> Tiling:
        """The rule for tiles of ``tile_size`` pixels."""
        return Tiling(tile_size, self.min_tiles, self.max_tiles, self.tiling_rule)

    def spare_packs(self, needed: int) -> int:
        """Packs to offer beyond the ``needed`` ones."""
        if self.packing_delta is not None:
            return self.packing_delta
        return needed // 500 if self.order == "planned" else -(-needed // 50)
