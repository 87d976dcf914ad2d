"""Saved in one layout, continued in another: losses and weights are those of a run that was never interrupted."""

import itertools
import random
from pathlib import Path

import pytest
import spread_cases as cases
from spread_cases import ALL

from megatron_eagle.config.layout import Layout

SAVED_AT = 2
LAYOUTS = {
    "tp2-pp2-dp2-spread": (8, Layout(tp=2, pp=2, encoder="spread")),
    "pp4": (4, Layout(pp=4)),
    "tp2-cp2-spread": (4, Layout(tp=2, cp=2, encoder="spread")),
    "pp2-vpp2": (2, Layout(pp=2, vpp=2)),
    "tp2-sequence-dp2": (4, Layout(tp=2, sequence_parallel=True)),
    "one": (1, Layout()),
}
Pair = tuple[str, str]
PAIRS: list[Pair] = list(itertools.product(LAYOUTS, LAYOUTS))
AFFORDABLE = [pair for pair in PAIRS if pair[0] != pair[1] and all(LAYOUTS[name][0] <= 4 for name in pair)]


def largest_differences(
    worlds, folder: Path, pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], tuple[float, float]]:
    """(largest relative difference of a loss, of a weight matrix) of every pair (saved in, continued in)."""
    expected = worlds(1).run(cases.train, Layout(), ALL)[0]
    found = {}
    for saved in sorted({pair[0] for pair in pairs}):
        processes, layout = LAYOUTS[saved]
        arguments = (None, None, None, None, SAVED_AT, folder / saved)
        before = worlds(processes).run(cases.train, layout, ALL, *arguments, timeout=300.0)
        assert before[0].losses == pytest.approx(expected.losses[:SAVED_AT], rel=1e-6)
        for pair in (pair for pair in pairs if pair[0] == saved):
            processes, layout = LAYOUTS[pair[1]]
            start = folder / saved / f"step_{SAVED_AT:08d}"
            arguments = (expected.weights, None, None, start)
            outcomes = worlds(processes).run(cases.train, layout, ALL, *arguments, timeout=300.0)
            wanted = expected.losses[SAVED_AT:]
            losses = [abs(a / b - 1) for o in outcomes for a, b in zip(o.losses, wanted, strict=True)]
            found[pair] = max(losses), max(outcome.worst for outcome in outcomes)
            print(f"{pair[0]:>20} -> {pair[1]:<20} loss {found[pair][0]:.1e}  weights {found[pair][1]:.1e}", flush=True)
    return found


def assert_small(found: dict[Pair, tuple[float, float]]) -> None:
    assert {pair: loss for pair, (loss, _) in found.items() if loss > 1e-6} == {}
    assert {pair: weights for pair, (_, weights) in found.items() if weights > 1e-5} == {}


def test_some_pairs_of_layouts_continue_each_other(worlds, tmp_path: Path) -> None:
    pairs = random.Random(6).sample(AFFORDABLE, 2)
    assert_small(largest_differences(worlds, tmp_path, pairs))


@pytest.mark.long
def test_every_pair_of_layouts_continues(worlds, tmp_path: Path) -> None:
    found = largest_differences(worlds, tmp_path, PAIRS)
    assert len(found) == len(LAYOUTS) ** 2
    assert_small(found)
