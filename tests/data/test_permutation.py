"""Passes shuffled place by place: permutations whatever the size, as random as numpy's, the same anywhere."""

import numpy as np
import pytest

from megatron_eagle.data.order.permutation import LARGEST, ShuffledPasses


def one_pass(size, key):
    return ShuffledPasses(size, key).stretch(0, size)


def test_every_size_up_to_2000_and_some_larger_ones_are_permuted():
    sizes = [*range(1, 2001), *np.random.default_rng(0).integers(2001, 200_000, 20).tolist(), 2**16, 10**6 + 3]
    for size in sizes:
        assert (np.bincount(one_pass(size, b"key"), minlength=size) == 1).all(), size


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 12_345])
def test_stretches_joined_are_the_whole_over_many_passes(size):
    row, borders = ShuffledPasses(size, b"key"), np.random.default_rng(size).integers(0, 5 * size, 12)
    borders = [0, *sorted(borders.tolist()), 5 * size]
    whole = row.stretch(0, 5 * size)
    joined = [row.stretch(begin, end) for begin, end in zip(borders, borders[1:], strict=False)]
    assert (np.concatenate(joined) == whole).all()
    passes = whole.reshape(5, size)
    assert (np.sort(passes) == np.arange(size)).all()
    assert size < 7 or len({tuple(own) for own in passes.tolist()}) == 5


def test_a_stretch_of_a_trillion_is_of_it():
    found = ShuffledPasses(10**12, b"key").stretch(3 * 10**12 - 5000, 3 * 10**12 + 5000)
    assert found.min() >= 0 and found.max() < 10**12 and len(set(found[:5000].tolist())) == 5000
    assert abs(np.mean(found) / 10**12 - 0.5) < 0.02


def test_small_sizes_come_out_in_every_order_equally_often():
    """All 24 orders of 4, 720 of 6 and 5040 of 7; the parity of a pass over 9, a square of odd side, is a coin's."""
    for size, orders in ((2, 2), (3, 6), (4, 24), (6, 720)):
        times = 40 * orders
        drawn = ShuffledPasses(size, b"orders").stretch(0, size * times).reshape(times, size)
        _, counts = np.unique(drawn @ size ** np.arange(size), return_counts=True)
        chi_square = ((counts - 40) ** 2 / 40).sum() + 40 * (orders - len(counts))
        assert chi_square < orders - 1 + 4 * np.sqrt(2 * orders), size
    passes = ShuffledPasses(9, b"parity").stretch(0, 9 * 2000).reshape(2000, 9)
    inversions = sum((passes[:, a] > passes[:, b]).astype(int) for a in range(9) for b in range(a + 1, 9))
    assert abs(np.mean(inversions % 2) - 0.5) < 0.05


def statistics(passes):
    """Of many orders of n: where each number is, fixed points, rising neighbours, neighbours that stay neighbours."""
    times, size = passes.shape
    expected = times / size
    held = np.stack([np.bincount(passes[:, place], minlength=size) for place in range(size)])
    places = ((held - expected) ** 2 / expected).sum() / (size - 1) ** 2
    pairs = np.bincount(passes[:, 0] * size + passes[:, 1], minlength=size * size)
    expected = times / (size * (size - 1))
    off_diagonal = pairs[~np.eye(size, dtype=bool).reshape(-1)]
    together = ((off_diagonal - expected) ** 2 / expected).sum() / (len(off_diagonal) - 1)
    steps = np.diff(passes, axis=1)
    return {
        "places": places,
        "pairs": together,
        "fixed points": np.mean((passes == np.arange(size)).sum(1)),
        "rising": np.mean(steps > 0),
        "neighbours": np.mean((np.abs(steps) == 1).sum(1)),
    }


@pytest.mark.parametrize("size", [13, 64, 100])
def test_orders_are_as_random_as_numpys(size):
    times = 20_000
    generator = np.random.default_rng(1)
    numpys = statistics(np.stack([generator.permutation(size) for _ in range(times)]))
    ours = statistics(ShuffledPasses(size, b"random").stretch(0, size * times).reshape(times, size))
    by_key = statistics(np.stack([one_pass(size, str(key).encode()) for key in range(times // 10)]))
    for found, sure in ((numpys, 1), (ours, 1), (by_key, 3)):
        assert found["places"] == pytest.approx(1, abs=0.15 * sure)
        assert found["pairs"] == pytest.approx(1, abs=0.15 * sure)
        assert found["fixed points"] == pytest.approx(1, abs=0.03 * sure)
        assert found["rising"] == pytest.approx(0.5, abs=0.005 * sure)
        assert found["neighbours"] == pytest.approx(2 * (size - 1) / size, abs=0.04 * sure)


def test_large_orders_show_no_pattern_to_simple_tests():
    """Places against numbers and neighbours against each other, in a pass of a billion, 30 x 30 cells each."""
    size, cells = 10**9, 30
    found = ShuffledPasses(size, b"large").stretch(123_456_789, 123_456_789 + 900_000)
    cell = found * cells // size
    tables = {
        "place": (np.arange(len(found)) * cells // len(found), cell),
        "next": (cell[:-1], cell[1:]),
        "far": (cell[:-31_623], cell[31_623:]),  # the side of the network's square
        "low digits": (found[:-1] % cells, found[1:] % cells),
    }
    for name, (rows, columns) in tables.items():
        counts = np.bincount(rows * cells + columns, minlength=cells * cells)
        expected = len(rows) / cells**2
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - cells**2) < 5 * np.sqrt(2 * cells**2), name


GOLDEN_10 = [7, 0, 8, 3, 9, 2, 1, 5, 4, 6]
GOLDEN_20 = [1, 6, 3, 5, 7, 0, 8, 4, 9, 2]
GOLDEN_BILLION = [221197361, 424945070, 597522560, 186634094]


def test_the_same_numbers_on_every_machine():
    assert one_pass(10, b"golden").tolist() == GOLDEN_10
    assert ShuffledPasses(10, b"golden").stretch(10, 20).tolist() == GOLDEN_20
    assert ShuffledPasses(10**9, b"golden").stretch(10**9 - 2, 10**9 + 2).tolist() == GOLDEN_BILLION


def test_what_cannot_be_shuffled_is_refused():
    for size in (0, LARGEST + 1):
        with pytest.raises(ValueError, match=f"a pass over {size} samples cannot be shuffled"):
            ShuffledPasses(size, b"")
    with pytest.raises(ValueError, match="places 4 to 3 are no stretch"):
        ShuffledPasses(9, b"").stretch(4, 3)
