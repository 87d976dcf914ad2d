"""Who encodes which tile when the encoders are spread over all processes of a replica, and the traffic that this makes.

An encoder on the first pipeline stage makes that stage wait for nobody and everybody wait for it: with two encoders a
tile costs 0.71 of what a 7B language model spends on its tokens. Spread, every process encodes an equal share of the
step's tiles before the pipeline starts. Three things move, each in one all-to-all over the replica: pixels from the
reader to the owners of the tiles, features from the owners home to the processes that embed them (all of the first
stage), and, after the pipeline, the features' gradients back to the owners.

All sizes follow from the number of tiles of the step, which every process knows. So all of them issue the same
collectives, with empty parts where they have nothing to give, whatever their share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eagle.parallel.groups import Groups


def shard_tiles(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that encodes each tile, in any unit of cost; ranks are never decreasing.

    A tile goes to the rank in whose equal part of the total its middle lies. Tiles of equal cost - all of one recipe
    go through the same encoders - give shares that differ by one tile at most, which is optimal; otherwise no rank
    gets more than the mean and one tile. Neighbours stay together, so that what moves is one block per rank.
    """
    total = sum(costs)
    owners, before = [], 0.0
    for cost in costs:
        owners.append(min(ranks - 1, int((before + cost / 2) * ranks / total)))
        before += cost
    return owners


def tile_balance(cost_per_rank: Sequence[float]) -> float:
    """Mean / max cost over ranks: 1 when nobody waits, 1/ranks when one does all; 1 if there is nothing to do."""
    most = max(cost_per_rank)
    return sum(cost_per_rank) / len(cost_per_rank) / most if most else 1.0


@dataclass(frozen=True)
class TileShards:
    """How many of a step's tiles, counted through its packs, each process of a replica encodes: rank 0 the first ones.

    per_rank: in the order of the replica's group.
    """

    per_rank: tuple[int, ...]

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(tiles: int, ranks: int) -> "TileShards":
        """Equal shares of ``tiles`` tiles; kept, for a search of layouts asks for the same ones again and again."""
        owners = shard_tiles([1.0] * tiles, ranks)
        return TileShards(tuple(owners.count(rank) for rank in range(ranks)))

    @property
    def total(self) -> int:
        return sum(self.per_rank)

    def block(self, rank: int) -> range:
        """The tiles of ``rank``."""
        start = sum(self.per_rank[:rank])
        return range(start, start + self.per_rank[rank])

    def block_by_pack(self, rank: int, tiles_per_pack: Iterable[int]) -> list[int]:
        """How many tiles of each pack ``rank`` encodes."""
        own, counts, start = self.block(rank), [], 0
        for tiles in tiles_per_pack:
            counts.append(max(0, min(own.stop, start + tiles) - max(own.start, start)))
            start += tiles
        return counts


def send_pixels(tiles: Tensor, shares: TileShards, groups: Groups) -> Tensor:
    """All tiles of the step, [shares.total, 3, s, s] on the reader and [0, 3, s, s] elsewhere -> this process's own."""
    rank, size = groups.replica.rank(), groups.replica.size()
    reader = dist.get_group_rank(groups.replica, groups.reader_rank)
    give = list(shares.per_rank) if rank == reader else [0] * size
    take = [shares.per_rank[rank] if sender == reader else 0 for sender in range(size)]
    return _all_to_all(tiles, give, take, groups)


def gather_features(own: Tensor, shares: TileShards, groups: Groups) -> Tensor:
    """Features of this process's tiles -> features of all tiles on the first stage, of none elsewhere.

    own: [shares.per_rank[rank], tokens, hidden]. Returns [shares.total or 0, tokens, hidden].
    """
    homes = [place.pp == 0 for place in groups.replica_coordinates]
    give = [len(own) if home else 0 for home in homes]
    take = list(shares.per_rank) if groups.is_first_stage else [0] * len(homes)
    return _all_to_all(torch.cat([own] * sum(homes)), give, take, groups)


def scatter_feature_grads(gradients: Tensor, shares: TileShards, groups: Groups) -> Tensor:
    """Gradients of all tiles' features on the first stage (of none elsewhere) -> those of this process's own tiles.

    The tensor-parallel processes of the first stage have the same gradient: of each owner's block one of them sends it,
    turn and turn about. Context-parallel processes hold a part of the gradient each: all send, the owner adds.
    """
    rank = groups.replica.rank()

    def sends(sender: int, owner: int) -> bool:
        place = groups.replica_coordinates[sender]
        return place.pp == 0 and owner % groups.tp_size == place.tp

    size = groups.replica.size()
    give = [shares.per_rank[owner] if sends(rank, owner) else 0 for owner in range(size)]
    take = [shares.per_rank[rank] if sends(sender, rank) else 0 for sender in range(size)]
    if groups.is_first_stage:
        blocks = gradients.split(shares.per_rank)
        gradients = torch.cat([gradients[:0], *(blocks[owner] for owner in range(size) if give[owner])])
    parts = _all_to_all(gradients, give, take, groups).unflatten(0, (groups.cp_size, shares.per_rank[rank]))
    return parts[0] if groups.cp_size == 1 else parts.float().sum(0).to(parts.dtype)


def _all_to_all(rows: Tensor, give: list[int], take: list[int], groups: Groups) -> Tensor:
    """Rows of ``rows`` to and from every process of the replica, counts in the order of its group."""
    received = rows.new_empty((sum(take), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), take, give, group=groups.replica)
    return received
