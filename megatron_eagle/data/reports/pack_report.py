"""How well samples pack and how evenly packs share out: each packing rule on the same lengths, as a table and a plot.

Padding is tokens that are computed for nothing. The spread of cost over the ranks of a step is time in which all but
one rank wait: a step lasts as long as its slowest rank. It is given for packs taken in order, for packs dealt by cost
(``balance_ranks.py``), and as the bound that no dealing can go below, since every rank has as many packs and one of
them has the heaviest. The more packs a rank has, the more evenly they can be dealt. Only who cuts packs goes below the
bound: the last number is that of ranks that share their packs eight by eight (``share_packs.py``).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.config.packing_rules import packing_rules
from megatron_eagle.data.order.balance_ranks import (
    balance_ranks,
    least_slowest_over_mean,
    pack_costs,
    slowest_over_mean,
)
from megatron_eagle.data.order.packing import pack_samples
from megatron_eagle.data.order.sample_index import Ints
from megatron_eagle.data.order.share_packs import EXCHANGE, PackWork, rank_times, share_packs
from megatron_eagle.errors import UserError

RANKS = 64
PACKS_PER_RANK = (1, 4, 16)
SHARED_BY = 8  # neighbours, the GPUs of a node if a rank is one of them
STEPS = 20  # of each size; their average is reported


@dataclass(frozen=True)
class Bounds:
    """What is packed into what: tokens and tiles of a pack, spare packs, and what a pack costs (``DataSettings``)."""

    length: int
    max_tiles: int | None
    spare: int
    attention_parity: int
    tile_cost: float


@dataclass(frozen=True)
class Spread:
    """Slowest rank over mean, averages over steps: packs in order, dealt by cost, and the bound for any dealing.

    shared: where ``SHARED_BY`` ranks share their packs (``layout.least_cp``), exchanges counted as time of the slowest,
        not in the mean; None if they do not divide the ranks.
    tiles: most tiles of a rank over mean, of the same dealing; None without tiles. They cost a rank time only if it
        encodes its own (``tile_cost`` then makes them part of the cost that is dealt by).
    """

    in_order: float
    dealt: float
    bound: float
    shared: float | None
    tiles: float | None


@dataclass(frozen=True)
class PackingResult:
    """One packing rule. costs: of every pack, in a shuffled order.

    spread: by packs a rank.
    """

    name: str
    seconds: float
    packs: int
    padding: float
    costs: NDArray[np.float64]
    spread: dict[int, Spread]


def lognormal_lengths(samples: int, median: float, sigma: float, length: int, seed: int = 0) -> Ints:
    """int64 [samples]: a long-tailed distribution; what is below 16 or would be longer than a pack is drawn again.

    UserError if that is nearly all.
    """
    normal = NormalDist(math.log(median), sigma) if median > 0 and sigma > 0 else None
    within = normal.cdf(math.log(length)) - normal.cdf(math.log(16)) if normal else float(median >= 16)
    within = within if length >= 16 and (normal or median <= length) else 0.0
    if within < 0.01:
        raise UserError(f"of lengths with median {median:g} and sigma {sigma:g}, {within:.2%} are from 16 to {length}")
    generator = np.random.default_rng(seed)
    found = np.zeros(0, np.int64)
    while len(found) < samples:
        drawn = np.exp(generator.normal(math.log(median), sigma, samples)).astype(np.int64)
        found = np.concatenate([found, drawn[(drawn >= 16) & (drawn <= length)]])
    return found[:samples]


def compare_packings(tokens: Ints, tiles: Ints, bounds: Bounds, ranks: int = RANKS) -> list[PackingResult]:
    """Packs the same samples by every rule."""
    return [_measure(rule, tokens, tiles, bounds, ranks) for rule in packing_rules()]


def _measure(rule: str, tokens: Ints, tiles: Ints, bounds: Bounds, ranks: int) -> PackingResult:
    started = time.process_time()
    plan = pack_samples(rule, tokens, bounds.length, tiles=tiles, max_tiles=bounds.max_tiles, spare=bounds.spare)
    packs = plan.packs
    seconds = time.process_time() - started
    useful = sum(int(tokens[own].sum()) for own in packs)
    costs = pack_costs(packs, tokens, tiles, bounds.length, bounds.attention_parity, bounds.tile_cost)
    tiles_of = np.array([tiles[own].sum() for own in packs], dtype=np.float64)
    order = np.random.default_rng(0).permutation(len(costs))
    work = _Work(costs[order], tiles_of[order], bounds)
    return PackingResult(
        name=rule,
        seconds=seconds,
        packs=len(packs),
        padding=1 - useful / (len(packs) * bounds.length),
        costs=work.costs,
        spread={each: spread for each in PACKS_PER_RANK if (spread := _spread(work, ranks, each)) is not None},
    )


@dataclass(frozen=True)
class _Work:
    """costs, tiles: of every pack."""

    costs: NDArray[np.float64]
    tiles: NDArray[np.float64]
    bounds: Bounds

    def slowest_shared(self, first: int, batch: int, ranks: int) -> float:
        """Slowest rank over mean of the step whose packs begin at ``first``."""
        costs = self.costs[first : first + batch]
        repeated = (self.tiles[first : first + batch] * self.bounds.tile_cost).tolist()
        exchange = EXCHANGE * self.bounds.length
        work = [PackWork(cost - own, own, exchange) for cost, own in zip(costs.tolist(), repeated, strict=True)]
        slowest = 0.0
        for replica in balance_ranks(costs, ranks // SHARED_BY):
            packs = [work[i] for i in replica]
            shares = share_packs(packs, SHARED_BY)
            times = [pack.of_each(len(own)) for pack, own in zip(packs, shares, strict=True)]
            slowest = max(slowest, *rank_times(times, shares, SHARED_BY))
        return slowest * ranks / float(costs.sum())


def _spread(work: _Work, ranks: int, each: int) -> Spread | None:
    """None if there is not one step's worth of packs."""
    costs, tiles = work.costs, work.tiles
    batch = ranks * each
    firsts = range(0, len(costs) - batch + 1, batch)[:STEPS]
    steps = [costs[first : first + batch] for first in firsts]
    if not steps:
        return None
    in_order = [slowest_over_mean(own, [range(rank, batch, ranks) for rank in range(ranks)]) for own in steps]
    shares = [balance_ranks(own, ranks) for own in steps]
    dealt = [slowest_over_mean(own, share) for own, share in zip(steps, shares, strict=True)]
    with_tiles = [(tiles[f : f + batch], s) for f, s in zip(firsts, shares, strict=True) if tiles[f : f + batch].any()]
    of_tiles = [slowest_over_mean(own, share) for own, share in with_tiles]
    shared = [work.slowest_shared(first, batch, ranks) for first in firsts] if ranks % SHARED_BY == 0 else []
    bounds = [least_slowest_over_mean(own, ranks) for own in steps]
    return Spread(
        float(np.mean(in_order)),
        float(np.mean(dealt)),
        float(np.mean(bounds)),
        float(np.mean(shared)) if shared else None,
        float(np.mean(of_tiles)) if of_tiles else None,
    )


def table(results: Sequence[PackingResult], ranks: int = RANKS) -> str:
    """The results as lines of text."""
    sizes = sorted({each for result in results for each in result.spread})
    heads = [f"{each} a rank: in order / dealt / bound / shared" for each in sizes]
    lines = [
        f"slowest of {ranks} ranks over their mean, and what it took to pack; no dealing can go below the bound, since "
        f"every rank has as many packs and one of them has the heaviest; shared: by {SHARED_BY} neighbours "
        f"(layout: cp={SHARED_BY}, least_cp=1)",
        " | ".join(["packing", "packs an epoch", "padding", "CPU seconds", *heads]),
    ]
    for r in results:
        own = [r.spread.get(each) for each in sizes]
        spreads = [_cell(s) if s else "-" for s in own]
        lines.append(" | ".join([r.name, str(r.packs), f"{r.padding:.3%}", f"{r.seconds:.1f}", *spreads]))
    return "\n".join(lines)


def _cell(spread: Spread) -> str:
    tiles = "" if spread.tiles is None else f" (tiles {spread.tiles:.4f})"
    shared = "-" if spread.shared is None else f"{spread.shared:.4f}"
    return f"{spread.in_order:.4f} / {spread.dealt:.4f} / {spread.bound:.4f} / {shared}{tiles}"


def plot(results: Sequence[PackingResult], tokens: Ints, title: str, path: Path) -> None:
    """A PNG of three parts: lengths of samples, cost of packs, slowest rank over mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (lengths, costs, spread) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    figure.suptitle(title)
    bins = np.unique(np.geomspace(max(1, tokens.min()), tokens.max() + 1, 50).astype(np.int64))
    lengths.hist(tokens, bins=bins.tolist(), color="tab:gray")
    lengths.set(xscale="log", xlabel="tokens of a sample", ylabel="samples")
    for r in results:
        costs.hist(r.costs / r.costs.mean(), bins=60, histtype="step", label=f"{r.name}, padding {r.padding:.2%}")
        sizes = sorted(r.spread)
        (line,) = spread.plot(sizes, [r.spread[each].dealt for each in sizes], marker="o", label=f"{r.name}, dealt")
        in_order = [r.spread[each].in_order for each in sizes]
        spread.plot(sizes, in_order, marker="o", linestyle=":", color=line.get_color(), label=f"{r.name}, in order")
    costs.set(xlabel="cost of a pack / mean", ylabel="packs", yscale="log")
    spread.set(xlabel="packs a rank", ylabel="slowest rank / mean", xscale="log", xticks=list(PACKS_PER_RANK))
    spread.set_xticklabels([str(each) for each in PACKS_PER_RANK])
    for part in (costs, spread):
        part.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
