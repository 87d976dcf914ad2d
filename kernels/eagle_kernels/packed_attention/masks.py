"""The mask of packed attention, made inside the kernels: one interval per row, worked out from ``cu_seqlens``.

A query at position p of segment [a, b) sees the keys [a, p + 1), or [a, b) without causality. Seen from the other side,
a key at position j is seen by the queries at positions [j, b), or [a, b). The intervals of a block's rows give the
bounds of its loop, so blocks of other segments are never visited, and they tell which blocks every row sees whole.
"""

import triton
import triton.language as tl

SCAN = tl.constexpr(1024)  # query positions looked at per step when searching for those that see a key block


@triton.jit
def segment_bounds(cu_seqlens, segments, positions, keys):
    """(start, end) of the segment of each position, by binary search; the empty (keys, 0) where there is none."""
    segment = tl.zeros_like(positions)
    candidates = segments + 1
    while candidates > 1:  # the last border <= position is one of ``candidates`` from ``segment`` on
        half = candidates // 2
        border = tl.load(cu_seqlens + segment + half)
        segment = tl.where(border <= positions, segment + half, segment)
        candidates -= half
    start = tl.load(cu_seqlens + segment)
    inside = (segment < segments) & (positions >= start) & (positions >= 0) & (positions < keys)
    end = tl.minimum(tl.load(cu_seqlens + tl.minimum(segment + 1, segments)), keys)
    return tl.where(inside, tl.maximum(start, 0), keys), tl.where(inside, end, 0)


@triton.jit
def visible_keys(cu_seqlens, query_positions, segments, rows, keys, CAUSAL: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """[first, last) key that each query row sees."""
    positions = tl.load(query_positions + rows) if HAS_POSITIONS else rows
    first, last = segment_bounds(cu_seqlens, segments, positions, keys)
    if CAUSAL:
        last = tl.minimum(last, positions + 1)
    return first, last


@triton.jit
def part_of_keys(first, last, part, keys, HAS_POSITIONS: tl.constexpr):
    """[low, high) of the keys that any row sees; with explicit positions, of part 0 or 1 of them.

    Rows of a context-parallel rank can jump, in the middle of a block, from one end of the pack to the other. Keys are
    parted at half of their span: rows that start before it, and the rest. If the two leave a gap, it is not visited.
    """
    low, high = tl.min(first, 0), tl.max(last, 0)
    if HAS_POSITIONS:
        middle = low + (high - low) // 2
        gap_start = tl.max(tl.where(first < middle, last, 0), 0)
        gap_end = tl.min(tl.where(first < middle, keys, first), 0)
        parted = (gap_end > gap_start) & (gap_end < high)
        if part == 0:
            high = tl.where(parted, gap_start, high)
        else:
            low = tl.where(parted, gap_end, high)
    return low, high


@triton.jit
def rows_that_see(query_positions, queries, low, high, HAS_POSITIONS: tl.constexpr):
    """[first, last) query row at a position in [low, high). Positions may be in any order: then rows between are
    masked.
    """
    if HAS_POSITIONS:
        first, last = queries, 0
        for start in range(0, queries, SCAN):
            rows = start + tl.arange(0, SCAN)
            positions = tl.load(query_positions + rows, mask=rows < queries, other=-1)
            hit = (positions >= low) & (positions < high)
            first = tl.minimum(first, tl.min(tl.where(hit, rows, queries), 0))
            last = tl.maximum(last, tl.max(tl.where(hit, rows + 1, 0), 0))
        return first, last
    return low, tl.minimum(high, queries)


@triton.jit
def split_blocks(low, high, latest_start, earliest_end, BLOCK: tl.constexpr):
    """Of the blocks from ``low`` to ``high``: how many there are, the first that all rows see whole, and how many
    such.
    """
    total = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    first_whole = tl.cdiv(tl.maximum(latest_start - low, 0), BLOCK)
    whole = tl.maximum((earliest_end - low) // BLOCK - first_whole, 0)
    return total, first_whole, whole
