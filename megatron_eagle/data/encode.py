"""One stored sample -> a segment of a pack; shared by both ways of ordering packs.

Two steps, because lengths are wanted long before pixels: ``tokenise`` looks at headers and text, ``add_tiles`` decodes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_eagle.data.broken import BrokenSample
from megatron_eagle.data.conversation import encode_conversation
from megatron_eagle.data.images import decode_image, read_size
from megatron_eagle.data.lengths import Cut, choose_cut
from megatron_eagle.data.packing import Segment
from megatron_eagle.data.settings import DataSettings
from megatron_eagle.data.shards import StoredSample
from megatron_eagle.data.tiling import cut_tiles
from megatron_eagle.data.tokenizer import Tokenizer


def tokenise(stored: StoredSample, settings: DataSettings, tokenizer: Tokenizer) -> tuple[Segment, Cut]:
    """Tokens of a sample without its pixels, and how these are to be cut; raises BrokenSample if it fits no pack."""
    s = settings
    sizes = [read_size(image, max_pixels=s.max_pixels) for image in stored.images]
    # A first look without the text, which turns into millions of tokens before it could be found too long.
    cut = choose_cut(sizes, 0, s)
    encoded = encode_conversation(stored.conversation, tokenizer, cut.tiles, s.tokens_per_tile, s.system)
    final = choose_cut(sizes, len(encoded.tokens) - sum(cut.tiles) * s.tokens_per_tile, s)
    if final != cut:
        encoded = encode_conversation(stored.conversation, tokenizer, final.tiles, s.tokens_per_tile, s.system)
    no_tiles = torch.empty((0, 3, s.tile_size, s.tile_size), dtype=torch.uint8)
    return Segment(stored.conversation.id, encoded.tokens, encoded.labels, encoded.tile_slots, no_tiles), final


def add_tiles(segment: Segment, images: Sequence[bytes], cut: Cut, settings: DataSettings) -> Segment:
    """The segment with the tiles of its images; raises BrokenSample if one cannot be decoded."""
    parts = [segment.tiles]
    for image, expected in zip(images, cut.tiles, strict=True):
        tiles = cut_tiles(decode_image(image, max_pixels=settings.max_pixels), cut.tiling)
        if len(tiles) != expected:
            raise BrokenSample(f"the image's header promises {expected} tiles, its pixels make {len(tiles)}")
        parts.append(tiles)
    return replace(segment, tiles=torch.cat(parts))
