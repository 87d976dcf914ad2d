"""Automatic Degrade Sampling: how much of a sample's pictures fits beside its text (Eagle 2.5, section 3.2.1).

Text is never cut; pictures get what is left of the pack. First time: as many frames (or pages) as fit at one tile each
beside one tile per image, up to what the sample has; a sample that cannot keep its least number of frames is dropped.
Then detail: the largest cap on tiles per image out of 12, 8, 6, 4, 2, 1 that still fits. The paper describes the
method; the released Eagle code does not contain it.

More budget never gives less: a grid chosen under a larger cap is the old one or one of more tiles (``tiling.py`` walks
through the candidates from few tiles to many), and frames are only ever added.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.tiling import count_tiles
from megatron_eagle.errors import BrokenSample

TILE_CAPS = (12, 8, 6, 4, 2, 1)


@dataclass(frozen=True)
class BudgetRequest:
    """What a sample would like to show.

    text_tokens: everything that is not a picture. image_sizes: (width, height) of images that may be tiled.
    frames: frames of a video or pages of a document, one tile each, at most (N_max); least_frames: N_min.
    frame_tokens: tokens that a frame costs on top of its tile, such as "Frame 3: ".
    """

    text_tokens: int
    image_sizes: tuple[tuple[int, int], ...] = ()
    frames: int = 0
    least_frames: int = 0
    frame_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.least_frames <= self.frames:
            raise ValueError(f"least_frames={self.least_frames} must be between 0 and frames={self.frames}")


@dataclass(frozen=True)
class Allocation:
    """What it may show: tiles of each image (thumbnails included) under ``tile_cap``, frames, and tokens of it all."""

    tiles: tuple[int, ...]
    tile_cap: int
    frames: int
    tokens: int


def allocate(request: BudgetRequest, length: int, tiling: Tiling, tokens_per_tile: int) -> Allocation:
    """Divides ``length`` tokens; raises BrokenSample if text, one tile an image and the least frames do not fit."""
    images = len(request.image_sizes)
    per_frame = tokens_per_tile + request.frame_tokens
    left = length - request.text_tokens - images * tokens_per_tile
    if left < 0:
        raise BrokenSample(
            f"sample of {request.text_tokens} tokens of text and {images} images, each at least {tokens_per_tile} "
            f"tokens, a pack holds {length}"
        )
    frames = min(request.frames, left // per_frame)
    if frames < request.least_frames:
        raise BrokenSample(
            f"{frames} frames fit beside {request.text_tokens} tokens of text and {images} images into {length} "
            f"tokens, at least {request.least_frames} are needed"
        )
    for_images = length - request.text_tokens - frames * per_frame
    cap, tiles = max(
        (cap, tiles)
        for cap in tile_caps(tiling)
        if sum(tiles := tiles_under(cap, request.image_sizes, tiling)) * tokens_per_tile <= for_images
    )
    tokens = request.text_tokens + frames * per_frame + sum(tiles) * tokens_per_tile
    return Allocation(tiles, cap, frames, tokens)


def tile_caps(tiling: Tiling) -> tuple[int, ...]:
    """The caps that are tried: the recipe's own maximum and every smaller one of the paper's."""
    return (tiling.max_tiles, *(cap for cap in TILE_CAPS if cap < tiling.max_tiles))


def tiles_under(cap: int, sizes: Sequence[tuple[int, int]], tiling: Tiling) -> tuple[int, ...]:
    """Tiles of each image, thumbnail included, if none may have a larger grid than ``cap`` tiles."""
    return tuple(count_tiles(width, height, capped(tiling, cap)) for width, height in sizes)


@lru_cache
def capped(tiling: Tiling, cap: int) -> Tiling:
    """The same rule with at most ``cap`` tiles."""
    return replace(tiling, max_tiles=cap, min_tiles=min(cap, tiling.min_tiles))


def outcomes(request: BudgetRequest, allocation: Allocation, tiling: Tiling) -> tuple[str, ...]:
    """What a sample that is used had to leave out; nothing if it is shown whole."""
    left_out = []
    if allocation.tiles != tiles_under(tiling.max_tiles, request.image_sizes, tiling):
        left_out.append(f"at most {allocation.tile_cap} tiles an image")
    if allocation.frames < request.frames:
        left_out.append("fewer frames")
    return tuple(left_out)


def degrade_report(by_source: Mapping[str, Counter[str]]) -> list[str]:
    """One line a source: how many samples are whole, degraded and how, dropped."""
    ordered = {source: sorted(counts.items(), key=_rank) for source, counts in by_source.items()}
    return [
        f"{source}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts)
        for source, counts in sorted(ordered.items())
    ]


def _rank(item: tuple[str, int]) -> tuple[int, str]:
    """Whole first, then degraded and by what, dropped last."""
    outcome = item[0]
    return {"whole": 0, "degraded": 1, "dropped": 3}.get(outcome, 2), outcome
