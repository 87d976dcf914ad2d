"""Keys and values that generation keeps, and how a pass of the model is told to use them.

It exists so that a token costs a pass over that token alone. Questions stand in *slots*. Their prompts go through the
model as a pack, with the attention that training has, and leave their keys and values here; from then on a pass has one
row a slot, its next token. The layers are those that train: the cache travels where the mask of a pack does, in
Megatron's ``packed_seq_params``, and nothing but the attention core sees it (``docs/decisions.md`` says why it is not
Megatron's own). Each process keeps its own layers and heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.parallel.context import Context, PackMask


@dataclass
class KeyValueCache:
    """slots, capacity: questions, and tokens of each, that there is memory for.

    layers: (keys, values) by layer number, each [slots, groups, capacity, head_dim]; made when a layer first writes.
    """

    slots: int = 0
    capacity: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def resize(self, kept: Sequence[int], slots: int, capacity: int) -> None:
        """Make room for ``slots`` questions of ``capacity`` tokens; the slots ``kept`` become the first ones."""
        if len(kept) > slots:
            raise ValueError(f"{len(kept)} questions do not fit into {slots} slots")
        tokens = min(self.capacity, capacity)
        for number, pair in self.layers.items():
            resized = []
            for old in pair:
                new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                new[: len(kept), :, :tokens] = old[list(kept), :, :tokens]
                resized.append(new)
            self.layers[number] = (resized[0], resized[1])
        self.slots, self.capacity = slots, capacity

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Keep key and value [n, groups, head_dim] of ``positions`` in ``slots``, both int64 [n]."""
        if layer not in self.layers:
            shape = (self.slots, key.shape[1], self.capacity, key.shape[2])
            # Zeros, because what is masked is multiplied by zero, and memory may hold a NaN.
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[slots, :, positions] = key
        values[slots, :, positions] = value


@dataclass(frozen=True)
class CachedRows:
    """What a pass of generation does with the cache.

    slots, positions: int64 [n], where keys and values of the pass's first n rows go; rows behind them are padding.
    wanted: int64 [m], rows whose logits are wanted; with sequence parallelism m divides by the tensor-parallel size.
    longest: None for prompts, which attend to their own pack. Otherwise there is one row for each slot, in order, and
        no position is beyond it.
    """

    cache: KeyValueCache
    slots: Tensor
    positions: Tensor
    wanted: Tensor
    longest: int | None = None

    def mask(self, batch: PackedBatch) -> "CachedMask":
        """On its way to the attention of each layer."""
        mask = PackMask.of(batch.cu_seqlens, batch.borders, Context())
        visible = None
        if self.longest is not None:
            visible = torch.arange(self.longest, device=self.positions.device) <= self.positions[:, None]
            visible = visible[:, None, None]
        given = {one.name: getattr(mask, one.name) for one in fields(PackMask) if one.init}
        return CachedMask(**given, rows=self, visible=visible)


@dataclass(kw_only=True)
class CachedMask(PackMask):
    """A mask with the cache; visible: bool [slots, 1, 1, longest], True where a slot's token may look."""

    rows: CachedRows
    visible: Tensor | None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
        """Keep a pass's keys and values [l, groups, d]; what queries [l, heads, d] of continued questions see, as they.

        None for prompts: what they see is in their pack.
        """
        rows, written = self.rows, len(self.rows.slots)
        rows.cache.write(layer, key[:written], value[:written], rows.slots, rows.positions)
        if rows.longest is None:
            return None
        keys, values = (kept[:, :, : rows.longest] for kept in rows.cache.layers[layer])
        # Heads that share a key head stand where a sequence's rows would: nothing is copied for them.
        shared = query.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(shared, keys, values, attn_mask=self.visible, scale=scale).flatten(1, 2)
