"""The process groups of a run: which processes share a tensor, follow in the pipeline, or hold copies of the model.

Megatron makes and keeps the groups (``megatron.core.parallel_state``); this puts what the rest of the house needs of
them into one object, and adds two groups that Megatron does not have: all processes of one replica of the model, which
train on the same packs, and those of them that host the encoders.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_eagle.errors import UserError
from megatron_eagle.layout import Layout
from megatron_eagle.platform import Platform


@dataclass(frozen=True)
class Groups:
    """This process's place in the run; ``<axis>_rank`` counts from 0 within the axis.

    dp: the group of processes that hold the same weights and train on different packs.
    replica: all tp x cp x pp processes of this process's copy of the model.
    reader_rank: global rank of the one process of the replica that reads its packs (tp, cp and pp rank 0).
    encoder_hosts: the processes of the replica on its first pipeline stage; None on the other stages.
    """

    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    tp_size: int
    pp_size: int
    cp_size: int
    dp_size: int
    dp: dist.ProcessGroup
    replica: dist.ProcessGroup
    reader_rank: int
    encoder_hosts: dist.ProcessGroup | None

    @property
    def is_reader(self) -> bool:
        return self.rank == self.reader_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def replica_size(self) -> int:
        return self.tp_size * self.cp_size * self.pp_size

    @property
    def encoder_hosts_size(self) -> int:
        return self.tp_size * self.cp_size


def initialise(layout: Layout, platform: Platform, *, timeout: timedelta) -> Groups:
    """Join the run and split it by ``layout``; every process of the run calls this together.

    Joins by what the launcher put into the environment (torchrun, or a script that sets MASTER_ADDR, MASTER_PORT, RANK
    and WORLD_SIZE), unless this process has joined already.
    timeout: how long a process waits for the others in a collective before it gives up.

    Raises UserError if the processes cannot be split into whole replicas of the model.
    """
    if not dist.is_initialized():
        device = platform.device if platform.backend == "nccl" else None
        dist.init_process_group(platform.backend, timeout=timeout, device_id=device)
    try:
        dp_size = layout.data_parallel_size(dist.get_world_size())
    except ValueError as error:
        raise UserError(str(error)) from None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    dp_rank = parallel_state.get_data_parallel_rank()
    places = _gather_places(dp_rank, pp_rank, platform.device)
    replicas = [[rank for rank, (dp, _) in enumerate(places) if dp == number] for number in range(dp_size)]
    hosts = [[rank for rank in ranks if places[rank][1] == 0] for ranks in replicas]
    replica = _one_group_of(replicas, timeout)
    assert replica is not None
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=dp_rank,
        tp_size=layout.tp,
        pp_size=layout.pp,
        cp_size=layout.cp,
        dp_size=dp_size,
        dp=parallel_state.get_data_parallel_group(),
        replica=replica,
        reader_rank=min(hosts[dp_rank]),  # Megatron numbers tp and cp fastest
        encoder_hosts=_one_group_of(hosts, timeout),
    )


def destroy() -> None:
    """Leave the run: forget Megatron's groups and close the connections."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _gather_places(dp_rank: int, pp_rank: int, device: torch.device) -> list[tuple[int, int]]:
    """(dp rank, pp rank) of every process, by global rank."""
    places = torch.empty(dist.get_world_size(), 2, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(places, torch.tensor([[dp_rank, pp_rank]], device=device))
    return [(int(dp), int(pp)) for dp, pp in places]


def _one_group_of(members: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make every group (all processes must take part in that) and return the one this process is in, if any."""
    own = None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    return own
