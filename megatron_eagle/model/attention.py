"""Attention of the local specs: packed and causal for the language model, batched and full for SigLIP.

Megatron's own DotProductAttention knows no packed sequences outside Transformer Engine. This one runs PyTorch's scaled
dot product attention on each segment of a pack by itself: nothing of size L x L is made, and a pack of many short
samples costs what the samples cost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class LocalAttention(MegatronModule):
    """softmax(Q K^T / sqrt(d)) V, as Megatron's ModuleSpec slot ``core_attention`` wants it.

    Shapes: packed, query [t, heads, d] and key, value [t, groups, d] -> [t, heads * d]; batched, [s, b, heads, d] and
    [s, b, groups, d] -> [s, b, heads * d]. ``groups`` key/value heads are shared evenly by the query heads.
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
        if config.context_parallel_size > 1:
            raise ValueError(
                f"local attention has no context parallelism, this layout has cp={config.context_parallel_size}"
            )
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        shared_by = query.shape[-2] // key.shape[-2]
        if shared_by > 1:  # PyTorch's fast kernel for the CPU wants as many key as query heads
            key, value = key.repeat_interleave(shared_by, dim=-2), value.repeat_interleave(shared_by, dim=-2)
        if packed_seq_params is None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
            return self._attend(query, key, value, causal).permute(2, 0, 1, 3).flatten(2)
        borders = packed_seq_params.cu_seqlens_q.tolist()
        segments = []
        for start, end in zip(borders[:-1], borders[1:], strict=True):
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, s, d]
            segments.append(self._attend(q, k, v, causal).squeeze(0).transpose(0, 1).flatten(1))
        return torch.cat(segments)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=self.softmax_scale)
