"""The attention cores: one for packs, causal and context-parallel, one for an encoder's batches of tiles.

Megatron's own DotProductAttention knows neither packs nor context parallelism outside Transformer Engine, and
Transformer Engine's context parallelism wants every segment padded to a multiple of the cut. Here a process takes
queries at any positions of a pack against all keys (``context.py``). A kernel of this project does that in one call, or
PyTorch's scaled dot product attention runs on each segment by itself (``BuildContext.kernels``). Neither makes anything
of size L x L, and a pack of many short samples costs what the samples cost.

Without context parallelism two others can stand in its place (``core_over_packs``): PyTorch's FlashAttention for
segments of any length, and Transformer Engine's. Both run on CUDA in bf16 only, and have not been run here.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.model.build_context import AttentionCore, Kernels
from megatron_eagle.model.key_value_cache import CachedMask
from megatron_eagle.parallel.context import PackMask, Piece

# (queries [l, heads, d] of a place, keys and values [L, groups, d] of the pack, mask, scale) -> [l, heads, d]
Attend = Callable[[Tensor, Tensor, Tensor, PackMask, float | None], Tensor]


def core_over_packs(attention: AttentionCore, kernels: Kernels) -> ModuleSpec:
    """What stands in the slot ``core_attention`` of a layer over packs; UserError if it is not installed."""
    if attention == "te":
        _te_attention()
        return ModuleSpec(module=TeAttention)
    if attention == "varlen":
        _varlen_attn()
        return ModuleSpec(module=PackedAttention, params={"attend": _attend_varlen})
    attend = _attend_in_kernel if kernels == "triton" else _attend_by_pieces
    return ModuleSpec(module=PackedAttention, params={"attend": attend})


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
        *,
        attend: Attend,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"attention over packs is causal, asked for {attn_mask_type}")
        self.layer_number, self.softmax_scale = layer_number, softmax_scale
        self.attend = attend

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
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if isinstance(packed_seq_params, CachedMask):
            seen = packed_seq_params.attend(self.layer_number, query, key, value, self.softmax_scale)
            if seen is not None:
                return seen.flatten(1).unsqueeze(1)
        query, key, value = context.to_heads(query, key, value)
        key, value = context.gather_places(key, value)
        output = self.attend(query, key, value, packed_seq_params, self.softmax_scale)
        return context.to_positions(output).flatten(1).unsqueeze(1)


class TeAttention(MegatronModule):
    """The same by Transformer Engine's DotProductAttention, which calls packs ``thd``. Not run yet."""

    def __init__(self, **named: Any) -> None:
        super().__init__(config=named["config"])
        # In a tuple it is no submodule: its state, of fp8 alone, would be one more name in checkpoints.
        self.cores = (_te_attention()(**named),)
        self.layer_number, self.softmax_scale = named["layer_number"], named.get("softmax_scale")

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
        borders, longest = packed_seq_params.cu_seqlens, packed_seq_params.longest
        segments = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if isinstance(packed_seq_params, CachedMask):
            seen = packed_seq_params.attend(self.layer_number, query, key, value, self.softmax_scale)
            if seen is not None:
                return seen.flatten(1).unsqueeze(1)
        mask = AttnMaskType.padding_causal
        output = self.cores[0](query, key, value, None, attn_mask_type=mask, packed_seq_params=segments)
        return output.reshape(len(query), 1, -1)


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


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, pack: PackMask, scale: float | None) -> Tensor:
    """The same in FlashAttention, for a place that holds whole packs. Not run yet."""
    longest = pack.longest
    return _varlen_attn()(
        query,
        key,
        value,
        pack.cu_seqlens,
        pack.cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # its way to say causal
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        raise UserError(
            f"model.attention: varlen needs torch 2.13, whose varlen_attn shares key heads, this is {torch.__version__}"
        )
    return varlen_attn


def _te_attention() -> Callable[..., MegatronModule]:
    if importlib.util.find_spec("transformer_engine") is None:  # Megatron's module can be imported without
        raise UserError(
            "model.attention: te needs Transformer Engine, which is not installed: pip install 'megatron-eagle[gpu]', "
            "or model.attention=packed"
        )
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def _attend_by_pieces(query: Tensor, key: Tensor, value: Tensor, pack: PackMask, scale: float | None) -> Tensor:
    """The same without a kernel of our own."""
    shared_by = query.shape[1] // key.shape[1]
    if shared_by > 1:  # PyTorch's fast kernel for the CPU wants as many key as query heads
        key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, l or L, d]
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=_mask(piece, query.device), is_causal=piece.starts_segment, scale=scale
        )
        for piece, q, k, v in zip(
            pack.pieces,
            _cut(query, [piece.rows for piece in pack.pieces]),
            _cut(key, [piece.keys for piece in pack.pieces]),
            _cut(value, [piece.keys for piece in pack.pieces]),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _cut(x: Tensor, parts: list[slice]) -> Sequence[Tensor]:
    """``parts`` of x [1, heads, L, d]. Where they are all of it, by one operation: the gradient of each of many slices
    is as long as the pack, so that a pack's cost would grow with the square of its segments."""
    if [part.stop for part in parts] == [*(part.start for part in parts[1:]), x.shape[2]] and parts[0].start == 0:
        return x.split([part.stop - part.start for part in parts], dim=2)
    return [x[:, :, part] for part in parts]


def _mask(piece: Piece, device: torch.device) -> Tensor | None:
    """True where a query of ``piece`` may look [rows, keys], or None where that is PyTorch's own causal mask."""
    if piece.starts_segment:
        return None
    rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
