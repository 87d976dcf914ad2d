"""Context parallelism: which positions of a pack a process holds, and how it meets the others' keys and values.

Eagle 2.5's two levels. Outside, the *ring*: a pack is cut into chunks, dealt out in zigzag to R places, and the place's
queries meet the keys and values of all places, which are gathered first; their gradients are added up and scattered
back. Llama 3 was trained so ("The Llama 3 Herd of Models", section 3.3.2), with chunks r and 2R-1-r of 2R at place r.
Here the zigzag has as many rounds as short chunks allow, because one round is balanced for a pack of one segment only
(docs/context_parallelism.md has the numbers). Inside, Ulysses ("DeepSpeed Ulysses"): the processes of one place hold an
equal part of its positions each, and for attention trade them for all positions of the place and a part of the heads.

The cut ignores segments: one may be longer than a chunk, and none needs padding. The attention mask follows from each
query's position in the pack. With one process everything here is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_eagle.config.layout import Layout

SHORTEST_CHUNK = 256  # positions; shorter ones balance better, but attention kernels work on 64 to 128 queries at once
MASKED_QUERIES = 512  # rows of a mask made at once; its size is at most this many by L


@dataclass(frozen=True)
class ContextShard:
    """What the ``rank``-th of ``ring * ulysses`` processes holds. Those of one place are neighbours in rank."""

    ring: int = 1
    ulysses: int = 1
    rank: int = 0

    def runs(self, length: int) -> list[range]:
        """The stretches of a pack of ``length`` that this process's place holds, ascending."""
        if self.ring == 1:
            return [range(length)]
        rounds, place, last = self._rounds(length), self.rank // self.ulysses, 2 * self.ring - 1
        chunk = length // (2 * self.ring * rounds)
        starts = [(number * 2 * self.ring + turn) * chunk for number in range(rounds) for turn in (place, last - place)]
        return [range(start, start + chunk) for start in starts]

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """The positions this process holds, ascending: int64 [length / (ring * ulysses)]."""
        place = torch.cat([torch.arange(run.start, run.stop, device=device) for run in self.runs(length)])
        return place.chunk(self.ulysses)[self.rank % self.ulysses]

    def find(self, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Which of ``places``, positions of the pack on the host, this process holds: (rows among its own, which).

        Both int64 on the host and as long as there are such places.
        """
        if self.ring * self.ulysses == 1:
            return places, torch.arange(len(places))
        held = self.positions(length)
        rows = torch.searchsorted(held, places).clamp(max=len(held) - 1)
        which = (held[rows] == places).nonzero()[:, 0]
        return rows[which], which

    def in_pack_order(self, x: Tensor) -> Tensor:
        """[L, ...] as the places hold it, one place after another -> in the pack's order."""
        if self.ring == 1:
            return x
        chunks = x.unflatten(0, (self.ring, self._rounds(len(x)), 2, -1)).transpose(0, 1)
        return torch.cat([chunks[:, :, 0], chunks[:, :, 1].flip(1)], dim=1).flatten(0, 2)

    def _rounds(self, length: int) -> int:
        """How often the zigzag goes through all places: the most for which chunks are long enough, and equal."""
        half = length // (2 * self.ring)
        return next(rounds for rounds in range(max(1, half // SHORTEST_CHUNK), 0, -1) if half % rounds == 0)


@dataclass(frozen=True)
class Context:
    """A process's share of every pack, and the groups it exchanges with; None where there is nothing to exchange."""

    share: ContextShard = ContextShard()
    whole: dist.ProcessGroup | None = None
    inside: dist.ProcessGroup | None = None
    outside: dist.ProcessGroup | None = None

    @staticmethod
    def of(layout: Layout, groups: ProcessGroupCollection) -> "Context":
        if layout.cp == 1:
            return Context()
        inside, outside = groups.hcp
        return Context(ContextShard(layout.ring, layout.ulysses, groups.cp.rank()), groups.cp, inside, outside)

    def to_heads(self, *parts: Tensor) -> Sequence[Tensor]:
        """Each of ``parts`` from this process's positions and all heads [l, heads, d] to its place's positions and some
        heads [l * ulysses, heads / ulysses, d], in one exchange."""
        ulysses = self.share.ulysses
        if ulysses == 1:
            return parts
        dealt = [part.unflatten(1, (ulysses, -1)) for part in parts]
        received = all_to_all(self.inside, torch.cat(dealt, dim=2).transpose(0, 1)).flatten(0, 1)
        return received.split([part.shape[2] for part in dealt], dim=1)

    def to_positions(self, x: Tensor) -> Tensor:
        """The way back from ``to_heads``."""
        if self.share.ulysses == 1:
            return x
        return all_to_all(self.inside, x.unflatten(0, (self.share.ulysses, -1))).transpose(0, 1).flatten(1, 2)

    def gather_places(self, *parts: Tensor) -> Sequence[Tensor]:
        """Each of ``parts`` from its place's positions [L / ring, n, d] to the whole pack in order [L, n, d], in one
        exchange. Backward adds up the places' gradients, in the dtype of ``parts``, and gives each place its own."""
        if self.share.ring == 1:
            return parts
        gathered = gather_from_sequence_parallel_region(torch.cat(parts, dim=1), group=self.outside)
        return self.share.in_pack_order(gathered).split([part.shape[1] for part in parts], dim=1)

    def gather_pack(self, x: Tensor) -> Tensor:
        """What every process has of a pack [l, ...] -> all of it in the pack's order [L, ...]."""
        if self.whole is None:
            return x
        return self.share.in_pack_order(gather_from_sequence_parallel_region(x, group=self.whole))


@dataclass(frozen=True)
class Piece:
    """Queries of one segment that lie together. rows: among those of the place; keys: in the pack.

    The keys run from the segment's start to the last query: the i-th of m rows attends to all n keys but the last
    m - 1 - i.
    """

    rows: slice
    keys: slice

    @property
    def starts_segment(self) -> bool:
        """Whether the queries are all there is before them: as many keys as rows."""
        return self.rows.stop - self.rows.start == self.keys.stop - self.keys.start


@dataclass(kw_only=True)
class PackMask(PackedSeqParams):
    """The attention mask of a pack, on its way to the attention of each layer in Megatron's ``packed_seq_params``.

    Its ``qkv_format`` is not Megatron's ``thd``, which would turn queries and keys by the rotary angles of a cut of
    each segment of its own.

    cu_seqlens: int32 [segments + 1], borders of the segments; query_positions: int32 [L / ring], where the place's
    queries are; pieces: the same for kernels that know no packs.
    """

    cu_seqlens: Tensor
    query_positions: Tensor
    pieces: list[Piece]
    context: Context

    @property
    def longest(self) -> int:
        """Tokens of the longest segment, for a place that holds whole packs: each piece is a segment there."""
        assert self.context.share.ring == 1
        return max(piece.keys.stop - piece.keys.start for piece in self.pieces)

    @staticmethod
    def of(cu_seqlens: Tensor, borders: Sequence[int], context: Context) -> "PackMask":
        """borders: ``cu_seqlens`` on the host."""
        runs = context.share.runs(borders[-1])
        dtype, device = cu_seqlens.dtype, cu_seqlens.device
        return PackMask(
            qkv_format="sbhd",
            cu_seqlens=cu_seqlens,
            query_positions=torch.cat([torch.arange(run.start, run.stop, dtype=dtype, device=device) for run in runs]),
            pieces=pieces(borders, runs),
            context=context,
        )


def pieces(borders: Sequence[int], runs: list[range]) -> list[Piece]:
    """Cut ``runs`` of a pack at the borders of its segments, and shorter where a piece needs a mask written out."""
    cut, before = [], 0
    for run in runs:
        for start, stop in zip(borders[:-1], borders[1:], strict=True):
            first, last = max(start, run.start), min(stop, run.stop)
            size = MASKED_QUERIES if first > start else max(last - first, 1)
            for row in range(first, last, size):
                end = min(row + size, last)
                cut.append(Piece(slice(before + row - run.start, before + end - run.start), slice(start, end)))
        before += len(run)
    return cut
