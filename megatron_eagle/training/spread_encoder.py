"""The encoders of ``encoder: spread`` while they train: forward before the pipeline, backward behind it.

Megatron's schedules know nothing of them. Before the schedule starts, every process encodes its share of the step's
tiles and the features go home to the first stage, where each pack gets its own as a leaf of the autograd graph. When
the schedule is through, the leaves' gradients travel back to the owners of the tiles, which run the backward pass of
what they encoded. The copies' gradients are then summed over all processes that hold one, i.e. all of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_eagle.config.layout import Layout
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.model.tile_encoder import TileEncoder
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.parallel.shard_tiles import TileShards, gather_features, scatter_feature_grads


@dataclass
class SpreadEncoder:
    """This process's copy of the encoders.

    copy: the modules. buffers: the same, wrapped, with the gradients; None if nothing in it is trained.
    chunk: how many tiles are encoded at a time, of which only the features are kept; None for all with activations.
    """

    copy: TileEncoder
    buffers: DistributedDataParallel | None
    groups: Groups
    chunk: int | None
    _step: "_Step | None" = field(default=None, init=False)

    @staticmethod
    def of(
        copy: TileEncoder,
        config: TransformerConfig,
        buckets: DistributedDataParallelConfig,
        groups: Groups,
        layout: Layout,
    ) -> "SpreadEncoder":
        """Wrap ``copy``, frozen as the stage wants it. config: the language model's, for how gradients add up."""
        encoder = SpreadEncoder(copy, None, groups, layout.encoder_chunk)
        if encoder.trainable_parameters:
            encoder.buffers = DistributedDataParallel(config, buckets, copy, pg_collection=encoder.megatron_groups())
        return encoder

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.copy.parameters() if parameter.requires_grad)

    def megatron_groups(self) -> ProcessGroupCollection:
        """The copies in Megatron's words: not split at all, and data-parallel over every process of the run."""
        self_group = dict.fromkeys(("tp", "pp", "cp", "ep", "mp", "expt_dp", "tp_ep_pp"), self.groups.self_group)
        world_group = dict.fromkeys(("dp", "dp_cp", "intra_dist_opt"), self.groups.world_group)
        return ProcessGroupCollection(**self_group, **world_group)

    def encode(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Features of every pack, [n, tokens_per_tile, hidden_size], on the first stage; of no tile on the others.

        Every process of the replica calls this with the packs that ``distribute_batch`` gave it.
        """
        tiles_per_pack = [len(batch.tile_slots) for batch in batches]
        shares = TileShards.of(sum(tiles_per_pack), self.groups.replica.size())
        tiles = torch.cat([batch.tiles for batch in batches])
        expected = shares.per_rank[self.groups.replica.rank()]
        if len(tiles) != expected:
            raise ValueError(
                f"rank {self.groups.rank} has {len(tiles)} of the step's {shares.total} tiles, its share is {expected}"
            )
        pieces = [self._encode_piece(piece) for piece in tiles.split(self.chunk or len(tiles))] if len(tiles) else []
        none = torch.empty((0, *self.copy.feature_shape), dtype=self.copy.dtype, device=tiles.device)
        own = torch.cat([none, *(piece.features.detach() for piece in pieces)])
        home = gather_features(own, shares, self.groups) if shares.total else none
        here = tiles_per_pack if self.groups.is_first_stage else [0] * len(batches)
        leaves = [part.requires_grad_(self.buffers is not None) for part in home.split(here)]
        self._step = _Step(shares, pieces, leaves)
        return leaves

    def backward(self) -> None:
        """Take the features' gradients, which the pipeline has left, through the encoders, and sum up the copies'."""
        step, self._step = self._step, None
        if step is None or self.buffers is None:
            return
        if step.shares.total:
            at_home = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in step.leaves]
            own = scatter_feature_grads(torch.cat(at_home), step.shares, self.groups)
            gradients = own.split([len(piece.tiles) for piece in step.pieces])
            for piece, gradient in zip(step.pieces, gradients, strict=True):
                features = piece.features if piece.features.requires_grad else self.copy(piece.tiles)
                torch.autograd.backward(features, gradient)
        self.buffers.finish_grad_sync()

    def _encode_piece(self, tiles: Tensor) -> "_Piece":
        # Encoding again pays where activations of the encoders would have to be kept; the connector's are small.
        vision_trains = any(parameter.requires_grad for parameter in self.copy.vision.parameters())
        encodes_again = self.chunk is not None and vision_trains
        with torch.set_grad_enabled(self.buffers is not None and not encodes_again):
            return _Piece(tiles, self.copy(tiles))


@dataclass
class _Piece:
    """Tiles encoded together; ``features`` has a graph unless the backward pass encodes them again."""

    tiles: Tensor
    features: Tensor


@dataclass
class _Step:
    """What is kept between forward and backward. leaves: each pack's features as the pipeline sees them."""

    shares: TileShards
    pieces: list[_Piece]
    leaves: list[Tensor]
