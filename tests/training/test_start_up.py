"""The parts of a start: together all the time since the process was born (in a run: ``test_train.py``, its kills)."""

import time
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from megatron_eagle.training.start_up import StartUp, describe


def slowest_of_two() -> tuple[dict[str, float], dict[str, float]]:
    """Runs in both processes of a world: process 1 takes longer for the model, process 0 for the data."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import join

    join(install(), timeout=timedelta(minutes=1))
    rank, now = dist.get_rank(), [psutil.Process().create_time()]
    start_up = StartUp(clock=lambda: now[0])
    for part, seconds in (("model", (1.0, 7.0)[rank]), ("data", (4.0, 2.0)[rank])):
        now[0] += seconds
        start_up.reached(part)
    return start_up.parts, start_up.slowest(torch.device("cpu"))


def test_the_slowest_process_of_each_part_is_told(worlds) -> None:
    (own, slowest), (_, same) = worlds(2).run(slowest_of_two)
    assert own == {"model": 1.0, "data": 4.0}
    assert slowest == same == {"model": 7.0, "data": 4.0, "all": 9.0}  # of all: process 1, not the sum of the slowest
    assert describe(slowest) == "first step after 9.0 s (slowest process of each): model 7.0, data 4.0"


def test_parts_are_all_the_time_since_the_process_was_born() -> None:
    start_up = StartUp()
    start_up.reached("imports")
    start_up.reached("model")
    born = psutil.Process().create_time()
    assert 0 <= time.time() - born - sum(start_up.parts.values()) < 0.5
