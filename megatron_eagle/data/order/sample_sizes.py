"""What a packing rule is given: the sizes of all samples and what one pack can hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Sizes: TypeAlias = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class SampleSizes:
    """lengths, tiles: of every sample, [samples]; length, max_tiles: of a pack, tiles may be unbounded (None).

    Plain integers: rules look at single samples, where numpy's are several times slower.
    """

    lengths: list[int]
    length: int
    tiles: list[int]
    max_tiles: int | None

    @staticmethod
    def of(lengths: Sizes, length: int, tiles: Sizes | None = None, max_tiles: int | None = None) -> "SampleSizes":
        """Without ``tiles`` no sample has any. ValueError for sizes that make no sense."""
        if max_tiles is not None and tiles is None:
            raise ValueError(f"max_tiles={max_tiles} needs the tiles of each sample")
        if tiles is not None and len(tiles) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(tiles)} tile counts")
        own = np.asarray(lengths, dtype=np.int64)
        if len(own) and own.min() < 1:
            raise ValueError(f"a sample of {own.min()} tokens cannot be packed")
        counts = np.zeros(len(own), dtype=np.int64) if tiles is None else np.asarray(tiles, dtype=np.int64)
        return SampleSizes(own.tolist(), length, counts.tolist(), max_tiles)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.array(self.lengths, dtype=np.int64)

    @cached_property
    def _fits(self) -> NDArray[np.bool_]:
        fits = self._lengths <= self.length
        if self.max_tiles is not None:
            fits &= np.array(self.tiles, dtype=np.int64) <= self.max_tiles
        return fits

    @cached_property
    def longest_first(self) -> list[int]:
        """The samples that fit into an empty pack, longest first, equally long ones in their order."""
        order = np.argsort(-self._lengths, kind="stable")
        return order[self._fits[order]].tolist()

    @cached_property
    def too_long(self) -> list[int]:
        """The samples that fit into no pack, ascending."""
        return np.flatnonzero(~self._fits).tolist()

    def fewest_packs(self) -> int:
        """Packs that the samples which fit need at least."""
        packs = math.ceil(int(self._lengths[self._fits].sum()) / self.length)
        if self.max_tiles is None:
            return packs
        return max(packs, math.ceil(sum(self.tiles[i] for i in self.longest_first) / self.max_tiles))

    def fits_tiles(self, held: int, sample: int) -> bool:
        """Whether ``sample`` may join a pack that holds ``held`` tiles."""
        return self.max_tiles is None or held + self.tiles[sample] <= self.max_tiles
