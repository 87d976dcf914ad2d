"""RMSNorm, SwiGLU and rotary positions of the language model in Liger-Kernel's Triton kernels, for the local specs.

Transformer Engine has its own; without it (``transformer_impl: local``) PyTorch does each in several operations that
keep what they pass on. Here each is one launch, and kept are a norm's input, the gate and up that a SwiGLU starts from,
and nothing of the rotary positions in a layer. Weights and their names are those of the modules they stand for.
"""

from typing import Any

import torch
from eagle_kernels.device import require_device
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.compat.liger import liger_ops
from megatron_eagle.model.norm import RMSNorm


class LigerRMSNorm(RMSNorm):
    """``RMSNorm`` in one kernel: the division in float32, the product with the weight in the dtype of x."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.apply_kernel = liger_ops().rms_norm

    def forward(self, x: Tensor) -> Tensor:
        require_device("rms_norm", x)
        # "llama" is the rounding said above. Not in place: that would write over a gradient which is not ours.
        return self.apply_kernel(x, self.weight, self.eps, 0.0, "llama", False, None)


class LigerSwiGLU(MegatronModule):
    """silu(gate) * up of [..., gate | up], both this tensor-parallel process's own halves -> [..., inner / tp].

    The backward pass writes the gradient over its input, the output of the layer's first product: nothing else keeps
    that one (a product's backward pass needs its input), and it is twice as wide as all else of the layer.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.apply_kernel = liger_ops().swiglu

    def forward(self, gate_and_up: Tensor) -> Tensor:
        require_device("swiglu", gate_and_up)
        rows = gate_and_up.flatten(0, -2)
        return self.apply_kernel(rows, True).unflatten(0, gate_and_up.shape[:-1])


class RotarySelfAttention(SelfAttention):
    """Megatron's, but queries and keys are turned in one kernel where they are made.

    ``rotary_pos_emb`` is ``rotary_table``, made once for all layers. Not in the attention core, whose inputs selective
    recomputation keeps: the kernel turns in place what it is given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turn = liger_ops().rope
        self.table: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        self.table = rotary_pos_emb
        try:
            return super().forward(*args, rotary_pos_emb=None, **kwargs)
        finally:
            self.table = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries [l, 1, heads, d] and keys [l, 1, groups, d]; values [l, 1, groups, d].

        Values are copied: as a view they would keep the product that all three are cut from.
        """
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        require_device("rope", query)
        assert self.table is not None
        cos, sin = self.table
        query, key = (x.permute(1, 2, 0, 3) for x in (query, key))  # [1, heads or groups, l, d], as the kernel wants it
        query, key = self.turn(query, key, cos, sin, None, 1, query.shape[-1])
        return query.permute(2, 0, 1, 3), key.permute(2, 0, 1, 3), value.contiguous()


def rotary_table(angles: Tensor) -> Tensor:
    """float32 [2, l, d/2], cosines and sines, of ``qwen.rotary_angles`` [l, 1, 1, d], whose halves are equal."""
    half = angles[:, 0, 0, : angles.shape[-1] // 2]
    return torch.stack((half.cos(), half.sin()))
