"""Packs to plan with: the data's own where it is at hand, else ragged ones made by the project's own packing.

Tokens per sample of Eagle 2's data are not published, so they are a parameter, as is the share of them that tiles make.
Lengths are spread log-normally; a sample's tiles are its visual tokens rounded to whole tiles.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import exp
from pathlib import Path
from typing import Protocol

import torch

from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.order.packing import pack_samples
from megatron_eagle.data.order.plan import Plan, open_stage_plan
from megatron_eagle.data.sample.assemble import Segment, assemble_pack
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.planning.activations import PackShape

SPREAD = 0.6  # standard deviation of the logarithm: nine samples in ten lie within a factor of 2.7 of the median


class Samples(Protocol):
    """Where packs come from."""

    def packs(self, count: int, length: int, tokens_per_tile: int) -> tuple[Sequence[PackShape], int]:
        """(``count`` packs of ``length`` tokens, samples in them)."""

    def describe(self) -> str:
        """Half a sentence for the assumptions of a plan."""


@dataclass(frozen=True)
class Given:
    """Packs of known shapes, one after another and from the first again."""

    shapes: tuple[PackShape, ...]

    def packs(self, count: int, length: int, tokens_per_tile: int) -> tuple[Sequence[PackShape], int]:
        chosen = [self.shapes[number % len(self.shapes)] for number in range(count)]
        if any(pack.length != length for pack in chosen):
            raise ValueError(f"packs of {sorted({pack.length for pack in chosen})} tokens, asked for {length}")
        return chosen, sum(len(pack.segments) - bool(pack.padding) for pack in chosen)

    def describe(self) -> str:
        return f"{len(self.shapes)} given packs"


@dataclass(frozen=True)
class DataOf:
    """The packs that a stage will train on, from its data sets' own lengths and the recipe's packing."""

    recipe: Recipe
    stage: Stage

    def packs(self, count: int, length: int, tokens_per_tile: int) -> tuple[Sequence[PackShape], int]:
        made, samples = [], 0
        for number in range(count):
            held = self._plan.pack(number).samples
            segments, samples = [sample.tokens for sample in held], samples + len(held)
            padding = length - sum(segments)
            tiles = sum(sample.tiles for sample in held)
            made.append(PackShape(tuple(segments + [padding] if padding else segments), tiles, padding))
        return made, samples

    @cached_property
    def _plan(self) -> Plan:
        return open_stage_plan(self.recipe, self.stage)

    def describe(self) -> str:
        return f"those of the stage's own data ({', '.join(source.path for source in self.stage.blend)})"


def samples_of(recipe: Recipe, stage: Stage, otherwise: "Mix") -> Samples:
    """The stage's own data if all of it and the tokenizer are on this machine, ``otherwise`` if not."""
    here = [Path(recipe.tokenizer.path), *(Path(source.path) for source in stage.blend)]
    return DataOf(recipe, stage) if all(path.exists() for path in here) else otherwise


@dataclass(frozen=True)
class Mix:
    """What samples look like. visual: share of a sample's tokens that tiles make; packing: rule that packs them."""

    tokens_per_sample: float = 2000.0
    visual: float = 0.8
    seed: int = 1
    packing: str = "balanced"

    def packs(self, count: int, length: int, tokens_per_tile: int) -> tuple[Sequence[PackShape], int]:
        return _packs(self, count, length, tokens_per_tile)

    def describe(self) -> str:
        return f"samples of {self.tokens_per_sample:.0f} tokens, {self.visual:.0%} of them tiles"

    def draw(self, count: int, length: int, tokens_per_tile: int) -> tuple[list[PackShape], int]:
        """As ``packs``, made anew."""
        draw = random.Random(self.seed)
        samples: list[tuple[int, int]] = []
        filled = 0
        while filled < 0.98 * count * length:
            samples.append(self._sample(draw, length, tokens_per_tile))
            filled += samples[-1][0]
        plan = pack_samples(self.packing, [tokens for tokens, _ in samples], length)
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

    def _pack(self, samples: Sequence[tuple[int, int]], length: int) -> PackShape:
        segments = [tokens for tokens, _ in samples]
        padding = length - sum(segments)
        return PackShape(
            tuple(segments + [padding] if padding else segments), sum(tiles for _, tiles in samples), padding
        )


@lru_cache(maxsize=64)
def _packs(mix: Mix, count: int, length: int, tokens_per_tile: int) -> tuple[tuple[PackShape, ...], int]:
    packs, samples = mix.draw(count, length, tokens_per_tile)
    return tuple(packs), samples


def synthetic(pack: PackShape, side: int, cost: int, device: torch.device | None = None) -> PackedBatch:
    """A pack of the given shape; all tiles stand in segments that are long enough for them. device: of the pixels."""
    segments, left = [], pack.tiles
    sizes = pack.segments[:-1] if pack.padding else pack.segments
    for number, size in enumerate(sizes):
        own = min(left, size // cost)
        left -= own
        tokens = torch.arange(size) % 300 + 1
        tiles = torch.zeros(own, 3, side, side, dtype=torch.uint8, device=device)
        segments.append(Segment(str(number), tokens, tokens.clone(), torch.arange(own) * cost, tiles))
    return assemble_pack(segments, pack.length, 0)
