"""The shared worlds do what tests rely on: order, errors with their rank, and an end to processes that hang or die."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from worlds import World, WorldError


def add_ranks(number):
    total = torch.tensor([dist.get_rank() + number])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank):
    if rank in (dist.get_rank(), "all"):
        raise ValueError(f"this is rank {dist.get_rank()}")
    dist.barrier()


def hang_or_die(how):
    if dist.get_rank() == 1:
        time.sleep(60) if how == "hang" else os._exit(7)


def test_results_come_in_order_of_rank_and_calls_do_not_disturb_each_other(worlds):
    assert worlds(2).run(add_ranks, 10) == [(0, 21), (1, 21)]
    assert worlds(2).run(add_ranks, 0) == [(0, 1), (1, 1)]
    assert worlds(2) is worlds(2)


def test_error_of_all_ranks_leaves_the_world_alive(worlds):
    world = worlds(2)
    world._calls = 0  # it is not due for new processes in between
    world.run(add_ranks, 0)
    processes = list(world._processes)
    with pytest.raises(WorldError, match="(?s)rank 0 of 2:.*this is rank 0.*rank 1 of 2:.*this is rank 1"):
        world.run(fail_on, "all")
    assert world.run(add_ranks, 0) == [(0, 1), (1, 1)]
    assert world._processes == processes


def test_error_of_one_rank_frees_those_who_wait_for_it(worlds):
    with pytest.raises(WorldError, match="(?s)rank 1 of 2:.*ValueError: this is rank 1"):
        worlds(2).run(fail_on, 1)
    assert worlds(2).run(add_ranks, 0) == [(0, 1), (1, 1)]


@pytest.mark.slow
def test_rank_that_hangs_or_dies_is_named_and_the_next_call_starts_afresh():
    world = World(2)
    try:
        with pytest.raises(WorldError, match="^rank 1 of 2:\nno answer within 8 s"):
            world.run(hang_or_die, "hang", timeout=8)  # rank 0 has to answer in it, on a busy machine, too
        assert world._processes == []
        with pytest.raises(WorldError, match="^rank 1 of 2:\ndied with exit code 7"):
            world.run(hang_or_die, "die")
    finally:
        world.stop()
