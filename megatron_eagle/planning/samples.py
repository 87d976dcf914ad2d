"""Packs to plan with, when the data itself is not at hand: ragged as real ones, made by the project's own packing.

Tokens per sample of Eagle 2's data are not published, so they are a parameter, as is the share of them that tiles make.
Lengths are spread log-normally; a sample's tiles are its visual tokens rounded to whole tiles.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp

from megatron_eagle.data.knapsack import pack_balanced
from megatron_eagle.planning.activations import Pack

SPREAD = 0.6  # standard deviation of the logarithm: nine samples in ten lie within a factor of 2.7 of the median


@dataclass(frozen=True)
class Mix:
    """What samples look like. visual: share of a sample's tokens that tiles make."""

    tokens_per_sample: float = 2000.0
    visual: float = 0.8
    seed: int = 1

    def packs(self, count: int, length: int, tokens_per_tile: int) -> tuple[Sequence[Pack], int]:
        """(``count`` packs of ``length`` tokens, samples in them)."""
        return _packs(self, count, length, tokens_per_tile)

    def draw(self, count: int, length: int, tokens_per_tile: int) -> tuple[list[Pack], int]:
        """As ``packs``, made anew."""
        draw = random.Random(self.seed)
        samples: list[tuple[int, int]] = []
        filled = 0
        while filled < 0.98 * count * length:
            samples.append(self._sample(draw, length, tokens_per_tile))
            filled += samples[-1][0]
        plan = pack_balanced([tokens for tokens, _ in samples], length, delta=0)
        chosen = sorted(plan.packs, key=lambda pack: -sum(samples[i][0] for i in pack))[:count]
        draw.shuffle(chosen)
        packs = [self._pack([samples[i] for i in pack], length) for pack in chosen]
        return packs, sum(len(pack) for pack in chosen)

    def _sample(self, draw: random.Random, length: int, tokens_per_tile: int) -> tuple[int, int]:
        wanted = self.tokens_per_sample * exp(draw.gauss(0.0, SPREAD) - SPREAD**2 / 2)
        wanted = min(max(wanted, 32.0), 0.95 * length)
        exact = wanted * self.visual / tokens_per_tile
        tiles = int(exact) + (draw.random() < exact - int(exact))
        tokens = int(wanted * (1 - self.visual)) + 16 + tiles * tokens_per_tile
        while tokens > length:
            tiles, tokens = tiles - 1, tokens - tokens_per_tile
        return tokens, tiles

    def _pack(self, samples: Sequence[tuple[int, int]], length: int) -> Pack:
        segments = [tokens for tokens, _ in samples]
        padding = length - sum(segments)
        return Pack(tuple(segments + [padding] if padding else segments), sum(tiles for _, tiles in samples), padding)


@lru_cache(maxsize=64)
def _packs(mix: Mix, count: int, length: int, tokens_per_tile: int) -> tuple[tuple[Pack, ...], int]:
    packs, samples = mix.draw(count, length, tokens_per_tile)
    return tuple(packs), samples
