"""What a step was like, put together from all processes: its loss, and what its packs held.

Each number lives somewhere else - the loss on the last pipeline stage, the samples on the process that read them, a
wish to stop wherever the signal came - and all of them travel in one sum of ``len(_SUMMED)`` numbers, however many
processes there are. Of the samples' ids a digest travels that can be added up; the names of rejected samples follow
only in a step that has any.
"""

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eagle.config.layers import Frozen
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.data.sample.packed_batch import PackedBatch, to_device
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.parallel.shard_tiles import TileShards
from megatron_eagle.training.log import digest_as_text, id_sum
from megatron_eagle.training.throughput import useful_flops

# float64: exact for counts up to 2^53, and for the 32-bit halves of digests of up to two million readers.
_SUMMED = ("stop", "digest_high", "digest_low", "useful_tokens", "tiles", "flops", "rejected")
_HALF = 32
_SUPERSEDED = float(1 << 32)  # beside the wishes to stop, of which there is at most one a process


@dataclass(frozen=True)
class StepStats:
    """A step of the whole run, the same on every process.

    loss: the objective. sample_digest: ``log.sample_digest`` of all its samples. flops: useful operations. rejected:
    how many samples were skipped since the step before. stop: whether any process was asked to stop. superseded:
    whether a newer start of the run is at work. tile_balance: mean / max tiles over the processes that encode, with
    spread encoders; None otherwise.
    """

    loss: float
    sample_digest: str
    useful_tokens: int
    tiles: int
    flops: float
    rejected: int
    stop: bool
    superseded: bool = False
    tile_balance: float | None = None


def collect_stats(
    loss: Tensor,
    batches: Sequence[PackedBatch],
    config: EagleConfig,
    trainable: Sequence[str],
    groups: Groups,
    *,
    lora: LoraSettings | None = None,
    frozen: tuple[Frozen, ...] = (),
    stop: bool = False,
    superseded: bool = False,
) -> StepStats:
    """The step's numbers, of which each process gives its own: every process calls this with its replica's packs.

    loss: this process's share, float64 scalar on the device. stop: whether this process was asked to stop. superseded:
    whether it has seen a newer start. The one place of a step where the host waits for the device.
    """
    tiles = sum(len(batch.tile_starts) for batch in batches)
    counts = dict.fromkeys(_SUMMED, 0.0) | {"stop": stop + superseded * _SUPERSEDED}
    if groups.is_reader:
        digest = id_sum(identity for batch in batches for identity in batch.sample_ids)
        counts |= {
            "digest_high": float(digest >> _HALF),
            "digest_low": float(digest % (1 << _HALF)),
            "useful_tokens": float(sum(batch.useful_tokens for batch in batches)),
            "tiles": float(tiles),
            "flops": useful_flops(config, trainable, batches, lora, frozen),
            "rejected": float(sum(len(batch.rejected) for batch in batches)),
        }
    own = loss if groups.is_last_stage and groups.tp_rank == 0 else torch.zeros_like(loss)
    numbers = torch.cat([own[None], _on_device(list(counts.values()), loss.device)])
    dist.all_reduce(numbers)
    if groups.spread_encoders:
        most = _on_device([max(TileShards.of(tiles, groups.replica_size).per_rank)], loss.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        numbers = torch.cat([numbers, most])
    total, *others = [float(number) for number in numbers.cpu()]
    summed = dict(zip(_SUMMED, others[: len(_SUMMED)], strict=True))
    return StepStats(
        loss=total,
        sample_digest=digest_as_text((int(summed["digest_high"]) << _HALF) + int(summed["digest_low"])),
        useful_tokens=int(summed["useful_tokens"]),
        tiles=int(summed["tiles"]),
        flops=summed["flops"],
        rejected=int(summed["rejected"]),
        stop=summed["stop"] % _SUPERSEDED > 0,
        superseded=summed["stop"] >= _SUPERSEDED,
        tile_balance=_balance(summed["tiles"], groups.world_size, others[-1]) if groups.spread_encoders else None,
    )


def gather_rejected(batches: Sequence[PackedBatch], groups: Groups) -> list[tuple[str, str]]:
    """(sample id, reason) of all samples skipped since the step before, on rank 0; nothing elsewhere.

    Costs as much as their names, so every process calls this only after a step whose ``StepStats.rejected`` is not 0.
    """
    if not groups.is_reader:
        return []
    own = [item for batch in batches for item in batch.rejected]
    parts: list[list[tuple[str, str]]] | None = [[]] * groups.dp_size if groups.rank == 0 else None
    dist.gather_object(own, parts, dst=0, group=groups.dp)  # the readers' data-parallel group is all of them
    return [item for part in parts or [] for item in part]


def _on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    return to_device(torch.tensor(numbers, dtype=torch.float64), device)


def _balance(tiles: float, processes: int, most: float) -> float:
    return tiles / processes / most if most else 1.0


def peak_rss_bytes(device: torch.device) -> int:
    """Highest resident memory of each process so far, added up over all of them."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = torch.tensor([kilobytes], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total) * 1024
