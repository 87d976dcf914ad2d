"""The process groups of a run, in worlds of several processes."""

from datetime import timedelta
from functools import partial

import pytest
import torch
from worlds import WorldError

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.parallel.groups import initialise

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="several processes cannot share one GPU under NCCL")


def groups_of(layout):
    groups = initialise(layout, install(), timeout=timedelta(seconds=60))
    members = partial(torch.distributed.get_process_group_ranks)
    hosts = groups.encoder_hosts and members(groups.encoder_hosts)
    return (
        members(groups.replica),
        members(groups.dp),
        hosts,
        groups.reader_rank,
        groups.is_reader,
        groups.is_last_stage,
    )


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            Layout(tp=2),
            [
                ([0, 1], [0, 2], [0, 1], 0, True, True),
                ([0, 1], [1, 3], [0, 1], 0, False, True),
                ([2, 3], [0, 2], [2, 3], 2, True, True),
                ([2, 3], [1, 3], [2, 3], 2, False, True),
            ],
        ),
        (
            Layout(pp=2),
            [
                ([0, 2], [0, 1], [0], 0, True, False),
                ([1, 3], [0, 1], [1], 1, True, False),
                ([0, 2], [2, 3], None, 0, False, True),
                ([1, 3], [2, 3], None, 1, False, True),
            ],
        ),
    ],
    ids=["tp-dp", "pp-dp"],
)
def test_groups_of_a_run(worlds, layout, expected):
    assert worlds(4).run(groups_of, layout) == expected


def pack_groups_of(layout):
    contexts = initialise(layout, install(), timeout=timedelta(seconds=60)).pack_contexts
    members = torch.distributed.get_process_group_ranks
    return {size: (context.share.rank, members(context.outside)) for size, context in contexts.items() if size > 1}


def test_neighbours_share_packs_by_powers_of_two(worlds):
    found = worlds(4).run(pack_groups_of, Layout(cp=4, least_cp=1))
    assert found == [
        {2: (0, [0, 1]), 4: (0, [0, 1, 2, 3])},
        {2: (1, [0, 1]), 4: (1, [0, 1, 2, 3])},
        {2: (0, [2, 3]), 4: (2, [0, 1, 2, 3])},
        {2: (1, [2, 3]), 4: (3, [0, 1, 2, 3])},
    ]
    assert worlds(4).run(pack_groups_of, Layout(cp=4)) == [{}] * 4


def test_processes_that_cannot_be_split_are_refused(worlds):
    with pytest.raises(
        WorldError, match="2 processes cannot be split into replicas of tp=3 x pp=1 x cp=1 = 3 processes"
    ):
        worlds(2).run(groups_of, Layout(tp=3))
