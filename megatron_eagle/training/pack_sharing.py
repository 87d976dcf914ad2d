"""The packs of a step that this process takes part in, and with whom, where each pack has as many ranks as it needs.

Every process of a replica has all of its packs and works out the same shares from them (``data/order/share_packs.py``),
so nothing is said. Weights of tokens hold the step's denominator and gradients are summed over all processes: which of
them compute a pack, and how many, changes neither loss nor gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.order.share_packs import PackWork, in_order, share_packs
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.parallel.context import Context


@dataclass(frozen=True)
class OwnPack:
    """pack: its number among the replica's packs of the step. context: this process's share of it."""

    pack: int
    context: Context


@dataclass(frozen=True)
class PackSharing:
    """contexts: by how many share a pack (``Groups.pack_contexts``); rank: of this process among all of cp.

    attention_parity, tile_cost: what packs cost (``PackCosts``).
    """

    contexts: dict[int, Context]
    rank: int
    attention_parity: int
    tile_cost: float

    @staticmethod
    def of(contexts: dict[int, Context], rank: int, settings: DataSettings) -> "PackSharing":
        return PackSharing(contexts, rank, settings.attention_parity, settings.tile_cost)

    def own(self, batches: Sequence[PackedBatch]) -> list[OwnPack]:
        """This process's packs of a step, in the order in which all processes take theirs; at least one.

        batches: all packs of the replica.
        """
        work = [
            PackWork.of_segments(batch.segment_lengths, len(batch.tile_starts), self.attention_parity, self.tile_cost)
            for batch in batches
        ]
        shares = share_packs(work, max(self.contexts), min(self.contexts))
        return [
            OwnPack(pack, self.contexts[len(shares[pack])]) for pack in in_order(shares) if self.rank in shares[pack]
        ]
