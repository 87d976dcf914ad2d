"""The process groups of a run: which processes share a tensor, follow in the pipeline, or hold copies of the model.

Megatron makes and keeps the groups (``megatron.core.parallel_state``); this puts what the rest of the package needs of
them into one object, and adds two groups that Megatron does not have: all processes of one replica of the model, which
train on the same packs, and those of them that host the encoders.
"""

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_eagle.compat.gradient_buffers import let_go_of_gradients
from megatron_eagle.compat.platform import Platform
from megatron_eagle.compat.process_groups import keep_context_levels
from megatron_eagle.config.layout import Layout
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.context import Context, ContextShard


@dataclass(frozen=True)
class RankCoordinates:
    """Where a process stands: its rank along each axis."""

    dp: int
    pp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Groups:
    """This process's place in the run; ``<axis>_rank`` counts from 0 within the axis.

    dp: the group of processes that hold the same weights and train on different packs.
    replica: all tp x cp x pp processes of this process's copy of the model.
    replica_hosts: the same processes, for what goes from host to host; gloo, also where ``replica`` is NCCL's.
    replica_coordinates: where each process of ``replica`` stands, in the order of that group.
    reader_rank: global rank of the one process of the replica that reads its packs (tp, cp and pp rank 0).
    encoder_hosts: the processes of the replica on its first pipeline stage; None on the other stages.
    world_group, self_group: all processes of the run, and this one by itself.
    pack_contexts: with ``layout.least_cp``, this process's share of a pack and the group it exchanges with, by how many
        of the cp processes share the pack; else empty.
    spread_encoders: whether the layout shares out the tiles over all processes of a replica (``encoder: spread``).
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
    replica_hosts: dist.ProcessGroup
    replica_coordinates: tuple[RankCoordinates, ...]
    reader_rank: int
    encoder_hosts: dist.ProcessGroup | None
    world_group: dist.ProcessGroup
    self_group: dist.ProcessGroup
    pack_contexts: dict[int, Context]
    spread_encoders: bool

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


def join(platform: Platform, *, timeout: timedelta) -> None:
    """Meet the other processes of the run, unless this one has already.

    By what the launcher put into the environment (torchrun, or a script that sets MASTER_ADDR, MASTER_PORT, RANK and
    WORLD_SIZE). No device is named here: with one, PyTorch makes NCCL's communicator of every group that any process
    makes, of all 5 409 at tp=2 pp=4 on 1 024 ranks, in a split that all 1 024 take part in; without, a process makes
    its own, when they are first used.
    """
    if not dist.is_initialized():
        dist.init_process_group(platform.backend, timeout=timeout)


def initialise(layout: Layout, platform: Platform, *, timeout: timedelta) -> Groups:
    """Join the run and split it by ``layout``; every process of the run calls this together.

    timeout: how long a process waits for the others in a collective before it gives up.

    Raises UserError if the processes cannot be split into whole replicas of the model.
    """
    join(platform, timeout=timeout)
    try:
        layout.data_parallel_size(dist.get_world_size())
    except ValueError as error:
        raise UserError(str(error)) from None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    places = _gather_places(_own_place(), platform.device)
    return split(layout, places, timeout)


def split(layout: Layout, places: list[RankCoordinates], timeout: timedelta) -> Groups:
    """The groups of a run whose processes stand at ``places``, by global rank; Megatron's own must exist already."""
    dp_size, own = layout.data_parallel_size(len(places)), _own_place()
    if layout.cp > 1:
        _make_context_levels(layout, places, timeout)
    replicas = [[rank for rank, place in enumerate(places) if place.dp == number] for number in range(dp_size)]
    hosts = [[rank for rank in ranks if places[rank].pp == 0] for ranks in replicas]
    replica, world_group = _one_group_of(replicas, timeout), dist.group.WORLD
    # Megatron makes gloo groups beside NCCL's, too, so gloo is known to find its way between the nodes.
    replica_hosts = _one_group_of(replicas, timeout, "gloo") if dist.get_backend() == "nccl" else replica
    assert replica is not None and replica_hosts is not None and world_group is not None
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=own.tp,
        pp_rank=own.pp,
        cp_rank=own.cp,
        dp_rank=own.dp,
        tp_size=layout.tp,
        pp_size=layout.pp,
        cp_size=layout.cp,
        dp_size=dp_size,
        dp=parallel_state.get_data_parallel_group(),
        replica=replica,
        replica_hosts=replica_hosts,
        replica_coordinates=tuple(places[rank] for rank in replicas[own.dp]),
        reader_rank=min(hosts[own.dp]),  # Megatron numbers tp and cp fastest
        encoder_hosts=_one_group_of(hosts, timeout),
        world_group=world_group,
        # Eagle has no experts, so Megatron's group of processes that share them is each process by itself.
        self_group=parallel_state.get_expert_model_parallel_group(),
        pack_contexts=_make_pack_contexts(layout, places, timeout) if layout.least_cp else {},
        spread_encoders=layout.encoder == "spread",
    )


def destroy() -> None:
    """Leave the run: let go of its wrapped models, forget Megatron's groups and close the connections."""
    let_go_of_gradients()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_place() -> RankCoordinates:
    return RankCoordinates(
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_rank(),
    )


def _gather_places(own: RankCoordinates, device: torch.device) -> list[RankCoordinates]:
    """The place of every process, by global rank."""
    places = torch.empty(dist.get_world_size(), 4, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(places, torch.tensor([[own.dp, own.pp, own.cp, own.tp]], device=device))
    return [RankCoordinates(*map(int, numbers)) for numbers in places]


def _make_context_levels(layout: Layout, places: list[RankCoordinates], timeout: timedelta) -> None:
    """Make the groups of context parallelism's two levels, the inner one first, where Megatron would keep them."""
    outer: dict[RankCoordinates, list[int]] = {}
    for rank, place in enumerate(places):
        outer.setdefault(replace(place, cp=place.cp % layout.ulysses), []).append(rank)
    inner = _group_of_neighbours(layout.ulysses, places, timeout)
    keep_context_levels([inner, _one_group_of(list(outer.values()), timeout)])


def _group_of_neighbours(size: int, places: list[RankCoordinates], timeout: timedelta) -> dist.ProcessGroup | None:
    members: dict[RankCoordinates, list[int]] = {}
    for rank, place in enumerate(places):
        members.setdefault(replace(place, cp=place.cp // size), []).append(rank)
    return _one_group_of(list(members.values()), timeout)


def _make_pack_contexts(layout: Layout, places: list[RankCoordinates], timeout: timedelta) -> dict[int, Context]:
    """For each size from ``least_cp`` to cp: neighbours in cp, the first of them a multiple of the size."""
    contexts: dict[int, Context] = {}
    size, own = layout.least_cp or layout.cp, _own_place()
    while size <= layout.cp:
        group = _group_of_neighbours(size, places, timeout) if size > 1 else None
        contexts[size] = Context(ContextShard(size, 1, own.cp % size), group, None, group)
        size *= 2
    return contexts


def _one_group_of(members: list[list[int]], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup | None:
    """Make every group (all processes must take part in that) and return the one this process is in, if any."""
    own = None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timeout, backend=backend)
        if dist.get_rank() in ranks:
            own = group
    return own
