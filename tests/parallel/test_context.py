"""The cut of a pack: every position in one place, and pieces that see what a mask over the whole pack would show."""

import contextlib
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.model.attention import _attend_by_pieces
from megatron_eagle.parallel import context
from megatron_eagle.parallel.context import Context, ContextShard, PackMask, pieces

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))  # ring, ulysses, positions per part
CHUNKS = st.sampled_from([1, 2, 3, 256])


@contextlib.contextmanager
def constants(**values: int):
    before = {name: getattr(context, name) for name in values}
    for name, value in values.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def shares(ring: int, ulysses: int) -> list[ContextShard]:
    return [ContextShard(ring, ulysses, rank) for rank in range(ring * ulysses)]


@settings(max_examples=60, deadline=None)
@given(SIZES, CHUNKS)
def test_every_position_is_held_once_and_equally_many_by_each(sizes, chunk):
    ring, ulysses, each = sizes
    length = 2 * ring * ulysses * each
    with constants(SHORTEST_CHUNK=chunk):
        held = [share.positions(length) for share in shares(ring, ulysses)]
    assert all(len(positions) == 2 * each for positions in held)
    assert all(bool((positions.diff() > 0).all()) for positions in held)
    assert torch.cat(held).sort().values.tolist() == list(range(length))


@settings(max_examples=60, deadline=None)
@given(SIZES, CHUNKS)
def test_parts_one_process_after_another_return_to_the_packs_order(sizes, chunk):
    ring, ulysses, each = sizes
    length = 2 * ring * ulysses * each
    with constants(SHORTEST_CHUNK=chunk):
        held = torch.cat([share.positions(length) for share in shares(ring, ulysses)])
        assert ContextShard(ring).in_pack_order(held).tolist() == list(range(length))


@settings(max_examples=60, deadline=None)
@given(SIZES, CHUNKS)
def test_one_long_segment_costs_every_place_the_same(sizes, chunk):
    ring, _, each = sizes
    length = 2 * ring * each
    with constants(SHORTEST_CHUNK=chunk):
        pairs = {int((share.positions(length) + 1).sum()) for share in shares(ring, 1)}
    assert len(pairs) == 1


def test_chunks_are_the_shortest_that_are_long_enough_and_fit():
    assert [len(ContextShard(4).runs(length)) for length in (2048, 4096, 131072)] == [2, 4, 128]
    assert {len(run) for run in ContextShard(2, rank=1).runs(4 * 1000)} == {500}  # 333 does not divide 1000


def test_packs_of_many_segments_are_balanced():
    """Mean over largest number of query-key pairs of 8 places; one round of zigzag gives 0.55 (at worst 0.4)."""
    balances = []
    for seed in range(10):
        draw, borders = random.Random(seed), [0]
        while borders[-1] < 131072:
            borders.append(min(131072, borders[-1] + 1 + int(draw.expovariate(1 / 4000))))
        costs = []
        for share in shares(8, 1):
            cut = [
                (p.rows.stop - p.rows.start, p.keys.stop - p.keys.start) for p in pieces(borders, share.runs(131072))
            ]
            costs.append(sum(rows * keys - rows * (rows - 1) // 2 for rows, keys in cut))
        balances.append(sum(costs) / 8 / max(costs))
    assert sum(balances) / 10 > 0.9 and min(balances) > 0.85


@st.composite
def cut_packs(draw):
    ring = draw(st.integers(1, 4))
    length = 2 * ring * draw(st.integers(1, 12))
    inner = draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else set()
    return ring, [0, *sorted(inner), length]


@settings(max_examples=60, deadline=None)
@given(cut_packs(), st.integers(1, 5), CHUNKS)
def test_pieces_show_each_query_its_segment_up_to_itself(cut, most_rows, chunk):
    ring, borders = cut
    length = borders[-1]
    segment = torch.bucketize(torch.arange(length), torch.tensor(borders[1:]), right=True)
    whole = (segment[:, None] == segment) & torch.ones(length, length, dtype=torch.bool).tril()
    with constants(MASKED_QUERIES=most_rows, SHORTEST_CHUNK=chunk):
        for share in shares(ring, 1):
            runs = share.runs(length)
            seen = torch.zeros(sum(map(len, runs)), length, dtype=torch.int)
            for piece in pieces(borders, runs):
                rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
                assert piece.starts_segment or rows <= most_rows
                seen[piece.rows, piece.keys] += torch.ones(rows, keys, dtype=torch.int).tril(keys - rows)
            assert torch.equal(seen, whole[share.positions(length)].int())


@pytest.mark.parametrize("borders", [(0, 48), (0, 1, 13, 30, 48), (0, 24, 48)], ids=str)
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_attention_of_a_place_is_the_packs_under_a_mask(ring, borders, monkeypatch):
    monkeypatch.setattr(context, "MASKED_QUERIES", 5)
    monkeypatch.setattr(context, "SHORTEST_CHUNK", 4)
    torch.manual_seed(0)
    query = torch.randn(48, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 48, 2, 8, dtype=torch.float64)
    segment = torch.bucketize(torch.arange(48), torch.tensor(borders[1:]), right=True)
    mask = (segment[:, None] == segment) & torch.ones(48, 48, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    for share in shares(ring, 1):
        held = share.positions(48)
        place = PackMask.of(torch.tensor(borders, dtype=torch.int32), borders, Context(share))
        assert place.query_positions.tolist() == held.tolist() and place.query_positions.dtype == torch.int32
        torch.testing.assert_close(_attend_by_pieces(query[held], key, value, place, None), want[held])
