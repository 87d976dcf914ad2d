"""Which data-parallel rank gets which packs of a step, so that none waits long for another.

All packs have the same number of tokens, but attention costs the sum of squares of their segments, and encoders cost
tiles. The step's loss is divided by one number for all ranks (docs/loss.md), so who computes a pack changes nothing
but time: packs are dealt by cost, heaviest first to the rank that has least, every rank the same number of packs.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Costs: TypeAlias = Sequence[float] | NDArray[np.float64]

SWAPS_PER_RANK = 20


def pack_costs(
    packs: Sequence[Sequence[int]],
    tokens: NDArray[np.integer],
    tiles: NDArray[np.integer],
    length: int,
    attention_parity: int,
    tile_cost: float,
) -> NDArray[np.float64]:
    """Cost of each pack, in tokens of the language model without attention.

    packs: indices into ``tokens`` and ``tiles`` of its samples; what they leave of ``length`` is padding, one more
    segment. Causal attention over n tokens costs n^2 / attention_parity of these units: 4 n^2 / 2 x hidden x layers
    operations against 2 x parameters a token give attention_parity = parameters / (layers x hidden).
    """
    if not packs:
        return np.zeros(0)
    members = np.concatenate([np.asarray(pack) for pack in packs])
    starts = np.cumsum([0, *(len(pack) for pack in packs[:-1])])
    return joined_pack_costs(members, starts, tokens, tiles, length, attention_parity, tile_cost)


def joined_pack_costs(
    members: NDArray[np.integer],
    starts: NDArray[np.integer],
    tokens: NDArray[np.integer],
    tiles: NDArray[np.integer],
    length: int,
    attention_parity: int,
    tile_cost: float,
) -> NDArray[np.float64]:
    """``pack_costs`` of packs that lie one after another in ``members``, from each of ``starts`` on; none is empty."""
    own = tokens[members].astype(np.float64)
    padding = length - np.add.reduceat(own, starts)
    squares = np.add.reduceat(own**2, starts) + padding**2
    return length + squares / attention_parity + np.add.reduceat(tiles[members].astype(np.float64), starts) * tile_cost


def balance_ranks(costs: Costs, ranks: int) -> list[list[int]]:
    """Indices into ``costs`` for each rank, ascending; a pure function of the costs.

    Raises ValueError if the packs cannot be shared out evenly.
    """
    if len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs cannot be shared out evenly to {ranks} ranks")
    each = len(costs) // ranks
    own: list[list[int]] = [[] for _ in range(ranks)]
    loads = np.zeros(ranks)
    open_ranks = np.arange(ranks)
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = int(open_ranks[np.argmin(loads[open_ranks])])
        own[rank].append(pack)
        loads[rank] += costs[pack]
        if len(own[rank]) == each:
            open_ranks = open_ranks[open_ranks != rank]
    if each > 1 and ranks > 1:
        _swap(np.asarray(costs, dtype=np.float64), own, loads)
    return [sorted(packs) for packs in own]


def _swap(costs: NDArray[np.float64], own: list[list[int]], loads: NDArray[np.float64]) -> None:
    """Lets the slowest rank exchange one pack with whoever leaves the pair's slower one fastest, while that helps."""
    table = np.array(own)
    for _ in range(SWAPS_PER_RANK * len(own)):
        slowest = int(np.argmax(loads))
        given = costs[table[slowest]][:, None, None]
        relief = given - costs[table][None, :, :]  # what the slowest is rid of, by (own pack, rank, its pack)
        after = np.maximum(loads[slowest] - relief, loads[None, :, None] + relief)
        after[:, slowest, :] = np.inf
        best = int(np.argmin(after))
        mine, rank, theirs = np.unravel_index(best, after.shape)
        if after.flat[best] >= loads[slowest]:
            break
        change = relief[mine, rank, theirs]
        loads[slowest] -= change
        loads[rank] += change
        table[slowest, mine], table[rank, theirs] = table[rank, theirs], table[slowest, mine]
    own[:] = table.tolist()


def slowest_over_mean(costs: Costs, shares: Sequence[Sequence[int]]) -> float:
    """How much longer the slowest rank computes than the average one."""
    loads = [sum(costs[i] for i in share) for share in shares]
    return max(loads) * len(loads) / sum(loads)


def least_slowest_over_mean(costs: Costs, ranks: int) -> float:
    """What no dealing can go below: the heaviest pack must sit with as many others as every rank has, at best the
    lightest ones."""
    ordered = np.sort(np.asarray(costs, dtype=np.float64))
    each = len(ordered) // ranks
    return float(max(1.0, (ordered[-1] + ordered[: each - 1].sum()) * ranks / ordered.sum()))
