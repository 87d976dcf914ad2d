"""What a step was like, put together from all processes: its loss, and what its packs held.

Kept out of the loop because each number lives somewhere else - the loss on the last pipeline stage, the samples on the
process that read them - and everyone has to take part in collecting it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_eagle.config.model import EagleConfig
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.parallel.shard_tiles import TileShards, tile_balance
from megatron_eagle.training.throughput import useful_flops


@dataclass(frozen=True)
class StepStats:
    """What the packs of a step held. rejected: (sample id, reason) of the samples skipped since the step before.

    flops: useful operations of the step. tile_balance: mean / max tiles over the processes that encode, with spread
    encoders; None otherwise.
    """

    sample_ids: list[str]
    useful_tokens: int
    tiles: int
    flops: float
    rejected: list[tuple[str, str]]
    tile_balance: float | None = None


def step_loss(share: float, groups: Groups, device: torch.device) -> float:
    """The loss of the step on every process, from the shares of those that hold the last pipeline stage."""
    own = share if groups.is_last_stage and groups.tp_rank == 0 else 0.0
    total = torch.tensor([own], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def gather_step_stats(
    config: EagleConfig, trainable: Sequence[str], batches: Sequence[PackedBatch], groups: Groups
) -> StepStats | None:
    """What all replicas read, on rank 0; None elsewhere. Every process calls this with its replica's packs."""
    if not groups.is_reader:
        return None
    own = StepStats(
        sample_ids=[identity for batch in batches for identity in batch.sample_ids],
        useful_tokens=sum(batch.useful_tokens for batch in batches),
        tiles=sum(len(batch.tile_slots) for batch in batches),
        flops=useful_flops(config, trainable, batches),
        rejected=[item for batch in batches for item in batch.rejected],
    )
    parts: list[Any] = [own]
    if groups.dp_size > 1:  # the readers' data-parallel group is all of them
        parts = [None] * groups.dp_size
        dist.all_gather_object(parts, own, group=groups.dp)
    if groups.rank != 0:
        return None
    return StepStats(
        sample_ids=[identity for part in parts for identity in part.sample_ids],
        useful_tokens=sum(part.useful_tokens for part in parts),
        tiles=sum(part.tiles for part in parts),
        flops=sum(part.flops for part in parts),
        rejected=[item for part in parts for item in part.rejected],
        tile_balance=_tile_balance([part.tiles for part in parts], groups),
    )


def _tile_balance(tiles_per_replica: Sequence[int], groups: Groups) -> float | None:
    if not groups.spread_encoders:
        return None
    shares = [TileShards.of(tiles, groups.replica_size) for tiles in tiles_per_replica]
    return tile_balance([count for share in shares for count in share.per_rank])
