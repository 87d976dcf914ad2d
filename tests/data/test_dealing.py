"""Dealing packs by cost, and the report about it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.order.balance_ranks import (
    balance_ranks,
    least_slowest_over_mean,
    pack_costs,
    slowest_over_mean,
)
from megatron_eagle.data.reports.pack_report import Bounds, compare_packings, lognormal_lengths, plot, table


def test_cost_is_length_attention_and_tiles():
    tokens, tiles = np.array([30, 50, 100]), np.array([1, 0, 4])
    costs = pack_costs([[0, 1], [2]], tokens, tiles, 100, attention_parity=200, tile_cost=3.0)
    assert costs.tolist() == [100 + (30**2 + 50**2 + 20**2) / 200 + 3, 100 + 100**2 / 200 + 12]
    assert pack_costs([], tokens, tiles, 100, 200, 3.0).tolist() == []


def best(costs, ranks):
    """Exhaustive: the least slowest/mean of all ways to give every rank as many packs."""
    each = len(costs) // ranks

    def ways(left):
        if not left:
            yield []
            return
        for rest in itertools.combinations(left[1:], each - 1):
            own = (left[0], *rest)
            for others in ways([i for i in left if i not in own]):
                yield [own, *others]

    return min(slowest_over_mean(costs, way) for way in ways(list(range(len(costs)))))


@given(st.lists(st.floats(1, 3), min_size=6, max_size=6), st.sampled_from([2, 3, 6]))
@settings(max_examples=200, deadline=None)
def test_every_rank_gets_as_many_and_little_is_left_to_gain(costs, ranks):
    shares = balance_ranks(costs, ranks)
    assert sorted(sum(shares, [])) == list(range(6)) and {len(share) for share in shares} == {6 // ranks}
    assert shares == balance_ranks(list(costs), ranks) and all(share == sorted(share) for share in shares)
    reached, bound = slowest_over_mean(costs, shares), best(costs, ranks)
    assert least_slowest_over_mean(costs, ranks) <= bound + 1e-9 <= reached + 2e-9 <= 1.12 * bound


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="7 packs cannot be shared out evenly to 2 ranks"):
        balance_ranks([1.0] * 7, 2)


def test_padding_and_balance_on_a_long_tail(tmp_path):
    """A tenth of the size that the million is reported for; benchmarks/data holds that one."""
    tokens = lognormal_lengths(100_000, 700, 1.0, 16384)
    assert tokens.max() <= 16384 and len(tokens) == 100_000
    bounds = Bounds(16384, None, spare=int(tokens.sum()) // 16384 // 500, attention_parity=65_000, tile_cost=0.0)
    results = compare_packings(tokens, np.zeros_like(tokens), bounds)
    assert [r.name for r in results] == ["balanced", "best_fit", "greedy"]
    for r in results:
        assert r.padding <= 0.01 and r.spread[4].dealt <= 1.04 and r.spread[16].dealt <= 1.01
        assert r.spread[4].bound <= r.spread[4].dealt < r.spread[4].in_order
        assert 1.0 < r.spread[1].shared < 1.05 < r.spread[1].bound and 1.0 < r.spread[4].shared < 1.03
    plot(results, tokens, "test", tmp_path / "packs.png")
    assert (tmp_path / "packs.png").read_bytes()[:4] == b"\x89PNG"
    lines = table(results).splitlines()
    assert len(lines) == 5 and lines[2].startswith(f"balanced | {results[0].packs} | 0.")


def test_a_bound_on_tiles_costs_little_padding():
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 1, 7, 13], size=20_000, p=[0.2, 0.2, 0.3, 0.3])
    tokens = tiles * 256 + rng.integers(50, 400, size=20_000)
    bounds = Bounds(16384, 64, spare=10, attention_parity=65_000, tile_cost=30.0)
    fewest = max(tiles.sum() / 64, tokens.sum() / 16384)
    for r in compare_packings(tokens, tiles, bounds):
        assert r.packs <= 1.03 * fewest
    result = compare_packings(tokens, tiles, bounds, ranks=8)[0]
    assert result.spread[4].tiles is not None and 1.0 <= result.spread[4].tiles < 1.2
    assert f"(tiles {result.spread[4].tiles:.4f})" in table([result], 8)
