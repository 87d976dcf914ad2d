"""Sharing packs among ranks: against all ways there are, on the long tail, and what it may not depend on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.order.share_packs import PackWork, group_sizes, in_order, rank_times, share_packs

works = st.builds(PackWork, st.floats(1, 4), st.sampled_from([0.0, 0.3]), st.just(0.01))


def slowest(packs, shares, ranks):
    """When the last rank is through, by playing all ranks' lists: a pack begins when all its ranks have come to it."""
    lists = {rank: [pack for pack in in_order(shares) if rank in shares[pack]] for rank in range(ranks)}
    clocks = dict.fromkeys(range(ranks), 0.0)
    assert all(lists.values()), "a rank has nothing to do"
    while any(lists.values()):
        ready = [p for p in range(len(packs)) if all(lists[rank][:1] == [p] for rank in shares[p])]
        assert ready, f"ranks wait for each other: {lists}"
        for pack in ready:
            done = max(clocks[rank] for rank in shares[pack]) + packs[pack].of_each(len(shares[pack]))
            for rank in shares[pack]:
                clocks[rank] = done
                lists[rank].pop(0)
    return max(clocks.values())


def best(packs, ranks, fewest):
    """Exhaustive: the least time of all ways to give packs to groups."""
    groups = [range(first, first + size) for size in group_sizes(ranks, fewest) for first in range(0, ranks, size)]
    ways = (way for way in itertools.product(groups, repeat=len(packs)) if len(set().union(*way)) == ranks)
    return min(slowest(packs, way, ranks) for way in ways)


@given(st.lists(works, min_size=1, max_size=4), st.sampled_from([(2, 1), (4, 1), (4, 2), (4, 4)]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_little_is_left_to_gain_and_nobody_waits_in_a_circle(packs, sizes):
    ranks, fewest = sizes
    shares = share_packs(packs, ranks, fewest)
    assert shares == share_packs(list(packs), ranks, fewest)
    assert all(len(own) in group_sizes(ranks, fewest) and own.start % len(own) == 0 for own in shares)
    reached, least = slowest(packs, shares, ranks), best(packs, ranks, fewest)
    times = [pack.of_each(len(own)) for pack, own in zip(packs, shares, strict=True)]
    assert max(rank_times(times, shares, ranks)) == pytest.approx(reached)
    assert least <= reached + 1e-9 <= 1.25 * least


@given(st.lists(works, min_size=1, max_size=40), st.sampled_from([(8, 1), (8, 2), (16, 1)]))
@settings(max_examples=100, deadline=None)
def test_it_is_never_worse_than_one_size_for_all(packs, sizes):
    ranks, fewest = sizes
    reached = slowest(packs, share_packs(packs, ranks, fewest), ranks)
    assert reached <= sum(pack.of_each(ranks) for pack in packs) + 1e-9


def test_long_tail_is_balanced_by_sharing():
    """Packs that cost 1 and a long tail above, one a rank: whole packs would leave a fifth of all time unused."""
    draw = np.random.default_rng(0)
    packs = [PackWork(1 + draw.exponential(0.3), 0.0, 0.01) for _ in range(8)]
    mean = sum(pack.shared for pack in packs) / 8
    assert max(pack.shared for pack in packs) > 1.2 * mean
    shares = share_packs(packs, 8)
    assert slowest(packs, shares, 8) < 1.06 * mean and len({len(own) for own in shares}) > 1


def test_costs_are_those_of_packs():
    work = PackWork.of_segments([30, 50, 20], tiles=2, attention_parity=200, tile_cost=3.0)
    assert work == PackWork(100 + (30**2 + 50**2 + 20**2) / 200, 6.0, 1.0)
    assert work.of_each(1) == 119 + 6 and work.of_each(4) == 119 / 4 + 6 + 1


@pytest.mark.parametrize(("ranks", "fewest"), [(6, 1), (8, 3), (12, 8)])
def test_groups_that_cannot_be_halved_are_refused(ranks, fewest):
    with pytest.raises(ValueError, match=f"{ranks} ranks cannot be halved into groups of {fewest}"):
        share_packs([PackWork(1, 0, 0)], ranks, fewest)
