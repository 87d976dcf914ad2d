"""One stored sample -> a segment of a pack; shared by both ways of ordering packs and by evaluation.

Two steps, because lengths are wanted long before pixels: ``tokenise`` looks at headers and text, ``add_tiles`` decodes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.dali import DaliDecoder
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.images import decode_pixels, read_size
from megatron_eagle.data.media.tiling import choose_grid, cut_tiles
from megatron_eagle.data.media.video import VideoReader
from megatron_eagle.data.order.scan import read_pictures
from megatron_eagle.data.sample.assemble import Segment
from megatron_eagle.data.sample.chatml import EncodedConversation, encode_conversation, encode_prompt
from megatron_eagle.data.sample.visual_plan import Clip, VisualPlan, VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.errors import BrokenSample


def tokenise(stored: StoredSample, planner: VisualPlanner, *, prompt: bool = False) -> tuple[Segment, VisualPlan]:
    """Tokens of a sample without its pixels, and how these are to be cut; raises BrokenSample if it fits no pack.

    prompt: up to where its last answer begins (``encode_prompt``) instead of the whole.
    """
    encode = encode_prompt if prompt else encode_conversation
    s = planner.settings
    pictures = read_pictures(stored, s.reading.max_pixels)
    # A first look without the text, which turns into millions of tokens before it could be found too long.
    plan = planner.plan(pictures, 0)
    encoded = _encode(encode, stored, planner, plan)
    final = planner.plan(pictures, len(encoded.tokens) - plan.tokens)
    if final != plan:
        encoded = _encode(encode, stored, planner, final)
    no_tiles = torch.empty((0, 3, s.tile_size, s.tile_size), dtype=torch.uint8)
    return Segment(stored.conversation.id, encoded.tokens, encoded.labels, encoded.tile_slots, no_tiles), final


def _encode(
    encode: Callable[..., EncodedConversation], stored: StoredSample, planner: VisualPlanner, plan: VisualPlan
) -> EncodedConversation:
    s = planner.settings
    videos = [clip.frames for clip in plan.clips]
    return encode(stored.conversation, planner.tokenizer, plan.tiles, s.tokens_per_tile, s.reading.system, videos)


def add_tiles(
    segment: Segment, stored: StoredSample, plan: VisualPlan, settings: DataSettings, dali: DaliDecoder | None = None
) -> Segment:
    """The segment with the tiles of its media in order; raises BrokenSample if one cannot be decoded.

    dali: takes the images that it can.
    """
    cut_already: dict[int, Tensor] = {}
    if dali is not None and stored.images:
        sizes = (read_size(image, max_pixels=settings.reading.max_pixels) for image in stored.images)
        grids = [choose_grid(width, height, plan.tiling) for width, height in sizes]
        cut_already = dali.cut(stored.images, grids, settings.reading.max_pixels)
    tiles = torch.empty((plan.total_tiles, 3, settings.tile_size, settings.tile_size), dtype=torch.uint8)
    place = 0
    for kind, number in stored.conversation.media:
        own: Iterable[Tensor]
        if kind == "image" and not plan.tiles[number]:  # a page that is left out
            continue
        if kind == "image" and number in cut_already:
            own = [cut_already[number]]
        elif kind == "image":
            own = _cut_image(stored.images[number], plan.tiling, plan.tiles[number], settings)
        else:
            own = _cut_frames(stored.videos[number], plan.clips[number], settings)
        for part in own:
            tiles[place : place + len(part)] = part
            place += len(part)
    return replace(segment, tiles=tiles)


def _cut_image(image: bytes, tiling: Tiling, expected: int, settings: DataSettings) -> Iterator[Tensor]:
    tiles = cut_tiles(decode_pixels(image, max_pixels=settings.reading.max_pixels), tiling)
    if len(tiles) != expected:
        raise BrokenSample(f"the image's header promises {expected} tiles, its pixels make {len(tiles)}")
    yield tiles


def _cut_frames(video: bytes | FileSlice, clip: Clip, settings: DataSettings) -> Iterator[Tensor]:
    """Tiles of one frame after another, so that only one is in memory as a picture."""
    with VideoReader(video, max_pixels=settings.reading.max_pixels) as reader:
        for frame in reader.frames(clip.times):
            # The container's size may be that of a frame lying on its side.
            upright = (frame.width > frame.height) == (reader.info.width > reader.info.height)
            yield cut_tiles(frame, settings.tiling, clip.grid if upright else (clip.grid[1], clip.grid[0]))
