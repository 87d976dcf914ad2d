"""The attention cores: one for packs, causal and context-parallel, one for an encoder's batches of tiles.

Megatron's own DotProductAttention knows neither packs nor context parallelism outside Transformer Engine, and
Transformer Engine's context parallelism wants every segment padded to a multiple of the cut. Here a process takes
queries at any positions of a pack against all keys (``context.py``). A kernel of this project does that in one call, or
PyTorch's scaled dot product attention runs on each segment by itself (``BuildContext.kernels``). Neither makes anything
of size L x L, and a pack of many short samples costs what the samples cost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.model.build_context import Kernels
from megatron_eagle.parallel.context import PackMask, Piece


class PackedAttention(MegatronModule):
    """Causal attention within each segment of a pack, as Megatron's ModuleSpec slot ``core_attention`` wants it.

    query [l, 1, heads, d] and key, value [l, 1, groups, d] of this process's l positions -> [l, 1, heads * d].
    ``groups`` key/value heads are shared evenly by the query heads. Gathered keys and values are made inside, so that
    recomputing the attention core keeps only this process's own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        kernels: Kernels = "torch",
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"attention over packs is causal, asked for {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.attend = _attend_in_kernel if kernels == "triton" else _attend_by_pieces

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackMask | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None, "the language model runs on packs"
        context = packed_seq_params.context
        query, key, value = context.to_heads(*(x.squeeze(1) for x in (query, key, value)))
        key, value = context.gather_places(key, value)
        output = self.attend(query, key, value, packed_seq_params, self.softmax_scale)
        return context.to_positions(output).flatten(1).unsqueeze(1)


class BatchedAttention(MegatronModule):
    """Attention of every token to every other of its sequence, all of one length: an encoder's, one sequence a tile.

    query [s, b, heads, d] and key, value [s, b, heads, d] -> [s, b, heads * d].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.no_mask:
            raise ValueError(f"attention over batches has no mask, asked for {attn_mask_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        output = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale)
        return output.permute(2, 0, 1, 3).flatten(2)


def _attend_in_kernel(query: Tensor, key: Tensor, value: Tensor, pack: PackMask, scale: float | None) -> Tensor:
    """Queries [l, heads, d] of a place, keys and values [L, groups, d] of the pack -> [l, heads, d], on a GPU."""
    from eagle_kernels.packed_attention import packed_attention  # needs Triton, which a CPU may lack

    positions = pack.query_positions if len(query) < len(key) else None
    return packed_attention(query, key, value, pack.cu_seqlens, softmax_scale=scale, query_positions=positions)


def _attend_by_pieces(query: Tensor, key: Tensor, value: Tensor, pack: PackMask, scale: float | None) -> Tensor:
    """The same without a kernel of our own."""
    shared_by = query.shape[1] // key.shape[1]
    if shared_by > 1:  # PyTorch's fast kernel for the CPU wants as many key as query heads
        key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, l or L, d]
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, piece.rows],
            key[:, :, piece.keys],
            value[:, :, piece.keys],
            attn_mask=_mask(piece, query.device),
            is_causal=piece.starts_segment,
            scale=scale,
        )
        for piece in pack.pieces
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _mask(piece: Piece, device: torch.device) -> Tensor | None:
    """True where a query of ``piece`` may look [rows, keys], or None where that is PyTorch's own causal mask."""
    if piece.starts_segment:
        return None
    rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
