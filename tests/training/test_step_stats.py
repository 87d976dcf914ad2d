"""The step's numbers: right whoever holds them, in messages that do not grow with the number of processes."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from eagle_cases import EAGLE, pack
from spread_cases import with_spread

from megatron_eagle.compat.platform import install
from megatron_eagle.compat.torch_dispatch import TorchDispatchMode, tree_leaves
from megatron_eagle.config.layout import Layout
from megatron_eagle.dry_run.walk import alone_in_the_world, coordinates
from megatron_eagle.training.log import sample_digest
from megatron_eagle.training.step_stats import StepStats, collect_stats, gather_rejected
from megatron_eagle.training.throughput import useful_flops

EVERYTHING = ("vision", "connector", "language")
SLOTS = ((2, 20, 75), (30,), (), (0, 16, 32, 48, 64))


def packs(number: int) -> list[Any]:
    """Two packs of replica ``number``, the second of which follows a rejected sample if the number is odd."""
    first, second = (pack(tile_slots=SLOTS[2 * number + place], seed=place) for place in range(2))
    return [
        replace(first, sample_ids=[f"a{number}", f"ö{number}"]),
        replace(second, sample_ids=[f"b{number}", "twice"], rejected=[(f"c{number}", "broken")] * (number % 2)),
    ]


def collected(layout: Layout) -> tuple[StepStats, list[tuple[str, str]]]:
    """Runs in every process of a world; the last rank was asked to stop, and each holds a part of the loss."""
    from megatron_eagle.parallel.distribute_batch import distribute_batch
    from megatron_eagle.parallel.groups import initialise

    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    batches = distribute_batch(lambda: packs(groups.dp_rank), groups, platform.device)
    share = torch.tensor(float(groups.rank + 1), dtype=torch.float64)
    stop = groups.rank == groups.world_size - 1
    stats = collect_stats(share, batches, EAGLE, EVERYTHING, groups, stop=stop)
    return stats, gather_rejected(batches, groups)


@pytest.mark.parametrize(
    ("layout", "loss", "balance"),
    [
        (Layout(), 3.0, None),  # rank 0 holds 1, rank 1 holds 2
        (Layout(pp=2), 2.0, None),  # the last stage's
        (Layout(tp=2), 1.0, None),  # the same twice: the first one's
        (with_spread(Layout()), 3.0, 4.5 / 5),  # 4 tiles and 5
        (with_spread(Layout(pp=2)), 2.0, 1.0),  # 4 tiles on two processes
    ],
    ids=["dp=2", "pp=2", "tp=2", "dp=2 spread", "pp=2 spread"],
)
def test_every_process_gets_the_sum_of_all(worlds, layout, loss, balance):
    results = worlds(2).run(collected, layout)
    read = [part for number in range(layout.data_parallel_size(2)) for part in packs(number)]
    ids = [identity for part in read for identity in part.sample_ids]
    expected = StepStats(
        loss=loss,
        sample_digest=sample_digest(reversed(ids)),
        useful_tokens=sum(part.useful_tokens for part in read),
        tiles=sum(len(part.tile_starts) for part in read),
        flops=useful_flops(EAGLE, EVERYTHING, read),
        rejected=sum(len(part.rejected) for part in read),
        stop=True,
        tile_balance=balance,
    )
    for stats, _ in results:
        assert replace(stats, flops=expected.flops) == expected
        assert stats.flops == pytest.approx(expected.flops, rel=1e-12)
    assert results[0][1] == [item for part in read for item in part.rejected] and results[1][1] == []


class Bytes(TorchDispatchMode):
    """Bytes of the tensors of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            self.sizes.append(sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("processes", [2, 1024])
@pytest.mark.parametrize(("layout", "sizes"), [(Layout(), [64]), (with_spread(Layout()), [64, 8])], ids=["", "spread"])
def test_messages_do_not_grow_with_the_run(processes, layout, sizes):
    """``processes`` replicas, as the first process of them would see it with nobody at the other end."""
    install()
    with alone_in_the_world(layout, coordinates(layout, processes), 0) as groups, Bytes() as seen:
        collect_stats(torch.ones((), dtype=torch.float64), packs(0), EAGLE, EVERYTHING, groups)
    assert seen.sizes == sizes
