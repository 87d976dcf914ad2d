"""Tokens and tiles of samples: of one that is about to be encoded, and of a whole data set by arithmetic alone.

Both must agree to the token, or a plan would promise packs that cannot be assembled; so the rule is here once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_eagle.data.broken import BrokenSample
from megatron_eagle.data.budget import Wanted, capped, grant, tiles_under
from megatron_eagle.data.catalogue import BROKEN_TOKENS, Catalogue, Ints, text_tokens
from megatron_eagle.data.settings import DataSettings
from megatron_eagle.data.tiling import Tiling, count_tiles
from megatron_eagle.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Lengths:
    """tokens, tiles: int32 [n] of each sample; rejected: why a sample fits into no pack (tokens 0)."""

    tokens: Ints
    tiles: Ints
    rejected: dict[int, str]


@dataclass(frozen=True)
class Cut:
    """How a sample's images are cut: the rule, and the tiles of each image that follow from it."""

    tiling: Tiling
    tiles: tuple[int, ...]


def choose_cut(sizes: Sequence[tuple[int, int]], text: int, settings: DataSettings) -> Cut:
    """The cut for a sample with ``text`` tokens beside its tiles; raises BrokenSample if it fits into no pack.

    With ``settings.degrade``, as many tiles as the pack leaves room for (``budget.py``).
    """
    s = settings
    cut = Cut(s.tiling, tiles_under(s.max_tiles, sizes, s.tiling))
    if s.degrade and text + sum(cut.tiles) * s.tokens_per_tile > s.pack_length:
        granted = grant(Wanted(text, tuple(sizes)), s.pack_length, s.tiling, s.tokens_per_tile)
        cut = Cut(capped(s.tiling, granted.tile_cap), granted.tiles)
    total = sum(cut.tiles)
    if s.max_tiles_per_pack is not None and total > s.max_tiles_per_pack:
        raise BrokenSample(f"sample of {total} tiles, a pack holds {s.max_tiles_per_pack}")
    tokens = text + total * s.tokens_per_tile
    if tokens > s.pack_length:
        raise BrokenSample(f"sample of {tokens} tokens ({total} tiles), a pack holds {s.pack_length}")
    return cut


def dataset_lengths(catalogue: Catalogue, tokenizer: Tokenizer, settings: DataSettings) -> Lengths:
    """Lengths of every sample of a data set."""
    text = np.asarray(text_tokens(catalogue, tokenizer, settings.system))
    tiles = _tiles(catalogue, settings)
    tokens = text + tiles * settings.tokens_per_tile
    unparsed = {sample: "cannot be parsed" for sample in np.flatnonzero(text == BROKEN_TOKENS).tolist()}
    rejected = {**unparsed, **catalogue.broken}
    most_tiles = settings.max_tiles_per_pack
    too_big = tokens > settings.pack_length
    if most_tiles is not None:
        too_big |= tiles > most_tiles
    for sample in np.flatnonzero(too_big).tolist():
        if sample in rejected:
            continue
        try:
            tiles[sample] = sum(choose_cut(catalogue.sizes_of(sample), int(text[sample]), settings).tiles)
            tokens[sample] = text[sample] + tiles[sample] * settings.tokens_per_tile
        except BrokenSample as error:
            rejected[sample] = str(error)
    unusable = np.fromiter(rejected, dtype=np.int64, count=len(rejected))
    tokens[unusable] = 0
    tiles[unusable] = 0
    return Lengths(tokens.astype(np.int32), tiles.astype(np.int32), rejected)


def _tiles(catalogue: Catalogue, settings: DataSettings) -> Ints:
    """int64 [n], before any degradation; each size is looked at once."""
    sizes, where = np.unique(np.asarray(catalogue.image_sizes), axis=0, return_inverse=True)
    of_size = np.array([count_tiles(width, height, settings.tiling) for width, height in sizes.tolist()], np.int64)
    images = of_size[where.reshape(-1)] if len(sizes) else np.zeros(0, np.int64)
    running = np.concatenate([[0], np.cumsum(images)])
    return running[catalogue.first_image[1:]] - running[catalogue.first_image[:-1]]
