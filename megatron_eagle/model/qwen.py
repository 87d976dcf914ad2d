"""Qwen2.5 as a Megatron GPTModel: RMSNorm, grouped-query attention with biases on Q, K and V, SwiGLU, rotary positions.

Four things differ from a stock GPTModel: the vocabulary is padded by a fixed amount whose columns never take part in
the softmax, so that tensor-parallel sizes share checkpoints and losses; embeddings come out whole, not yet split along
the sequence, because image features are put among them first; rotary angles follow the position ids, which start
anew in every segment wherever a pack is cut; and the result is the weighted loss of the pack, so that a kernel can make
it without the logits of all positions.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_eagle.compat.gpt_model import HookedGPTModel
from megatron_eagle.config.model import QwenConfig
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL
from megatron_eagle.model.build_context import BuildContext, transformer_config
from megatron_eagle.model.key_value_cache import CachedMask
from megatron_eagle.model.offload import HiddenStatesOnHost
from megatron_eagle.model.specs import block_spec

if TYPE_CHECKING:
    from eagle_kernels.linear_cross_entropy import Losses


class QwenModel(HookedGPTModel):
    """The layers of one pipeline stage; the first stage also embeds, the last also predicts.

    pre_process, post_process: whether this stage is the first, the last.
    vp_stage: which of the process's virtual stages this is, None without them.
    """

    def __init__(
        self,
        qwen: QwenConfig,
        build: BuildContext,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        config = transformer_config(
            build,
            in_pipeline=True,
            num_layers=qwen.num_hidden_layers,
            hidden_size=qwen.hidden_size,
            ffn_hidden_size=qwen.intermediate_size,
            num_attention_heads=qwen.num_attention_heads,
            num_query_groups=qwen.num_key_value_heads,
            normalization="RMSNorm",
            layernorm_epsilon=qwen.rms_norm_eps,
            add_bias_linear=False,
            add_qkv_bias=True,
            gated_linear_unit=True,
            activation_func=F.silu,
            # Megatron's switch for an activation module in the spec, whoever made it.
            use_te_activation_func=build.liger,
        )
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=get_pg_rank(build.groups.pp))
        super().__init__(
            config,
            block_spec(
                build.transformer_impl,
                layers=layers,
                rms_norm=True,
                mask=AttnMaskType.causal,
                kernels=build.kernels,
                attention=build.attention,
            ),
            vocab_size=qwen.padded_vocab_size,
            max_sequence_length=qwen.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=qwen.tie_word_embeddings,
            position_embedding_type="none",  # see before_layers
            scatter_embedding_sequence_parallel=False,
            pg_collection=build.groups,
            vp_stage=vp_stage,
        )
        self.real_vocab_size = qwen.vocab_size
        self.loss_in_kernel = build.kernels == "triton"
        self.rope_theta = qwen.rope_theta
        self.turns_in_kernel = build.liger
        self._on_host = HiddenStatesOnHost(qwen.hidden_size, build.dtype) if build.recompute == "offload" else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._on_host.keep() if self._on_host else contextlib.nullcontext():
            return super().forward(*args, **kwargs)

    def before_layers(self, position_ids: Tensor) -> Tensor:
        """Rotary angles [l, 1, 1, head_dim] of ``position_ids`` [1, l], or what the kernel wants of them."""
        angles = rotary_angles(position_ids[0], self.config.kv_channels, self.rope_theta)
        if not self.turns_in_kernel:
            return angles
        from megatron_eagle.model.liger import rotary_table  # needs Triton, which a CPU may lack

        return rotary_table(angles)

    def after_layers(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        pack: PackedSeqParams | None,
        predict: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Megatron's own ``predict``, but with labels the last stage returns cross entropies summed with ``loss_mask``.

        labels: int64 [1, l]. loss_mask: float32 [1, l], the weights of the positions. The sum is a float32 scalar.
        Without ``loss_mask`` they are not summed, [1, l]. While generating it predicts at the wanted rows only.
        """
        if isinstance(pack, CachedMask) and self.post_process:
            return predict(self._select(hidden_states, pack.rows.wanted))
        if labels is None or not self.post_process:
            return predict(hidden_states)
        if self.loss_in_kernel:
            weights = torch.zeros_like(labels[0], dtype=torch.float32) if loss_mask is None else loss_mask[0]
            losses = self._loss_in_kernel(hidden_states, labels[0], weights)
            return losses.tokens[None] if loss_mask is None else losses.loss
        losses = predict(hidden_states)
        return losses if loss_mask is None else (losses * loss_mask).sum()

    def _select(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """``rows`` of a pass, split over the tensor-parallel processes as all of them were."""
        if not self.config.sequence_parallel:
            return hidden_states[rows]
        group = self.pg_collection.tp
        return scatter_to_sequence_parallel_region(
            gather_from_sequence_parallel_region(hidden_states, group=group)[rows], group=group
        )

    def _loss_in_kernel(self, hidden_states: Tensor, labels: Tensor, weights: Tensor) -> "Losses":
        """The same from hidden states [l(/tp with sequence parallelism), 1, hidden_size], logits never held whole."""
        from eagle_kernels.linear_cross_entropy import linear_cross_entropy  # needs Triton, which a CPU may lack

        group = self.pg_collection.tp
        if self.config.sequence_parallel:  # its backward pass adds up what each process's columns give to the gradient
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        tied = self.share_embeddings_and_output_weights
        columns = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return linear_cross_entropy(
            hidden_states[:, 0],
            columns,
            labels,
            weights,
            vocabulary_size=self.real_vocab_size,
            vocabulary_start=get_pg_rank(group) * len(columns),
            process_group=group,
            reduce_hidden_gradient=not self.config.sequence_parallel,
            ignore_label=IGNORE_LABEL,
        )

    def mask_padded_vocabulary(self, logits: Tensor) -> Tensor:
        """Make the padding's columns of ``logits`` [..., padded_vocab/tp] impossible, in place."""
        columns = logits.shape[-1]
        real = self.real_vocab_size - get_pg_rank(self.pg_collection.tp) * columns
        if real < columns:
            logits[..., max(real, 0) :] = torch.finfo(logits.dtype).min
        return logits

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of every position, float32 [b, s]; 0 where the label is IGNORE_LABEL.

        labels: int64 [b, s]; logits: [s, b, padded_vocab/tp].
        """
        counted = labels != IGNORE_LABEL
        loss = super().compute_language_model_loss(labels.clamp(min=0), self.mask_padded_vocabulary(logits))
        return torch.where(counted, loss.float(), 0.0)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """float32 [l, 1, 1, head_dim]: position times theta^(-2i/head_dim) for i < head_dim/2, twice over (RoFormer; halves
    instead of pairs, as in transformers)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = torch.outer(position_ids.float(), 1.0 / theta**exponents)
    return torch.cat([angles, angles], dim=-1)[:, None, None]
