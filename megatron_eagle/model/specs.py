"""Which module stands in each slot of a transformer layer: Megatron ModuleSpecs for both transformer implementations.

``local`` runs anywhere and is what the tests run; with kernels, its norms, SwiGLU and rotary positions are
Liger-Kernel's. ``transformer_engine`` is for GPUs; without one it can be built over a stub, but not run (tests/te), so
this branch holds nothing but names, taken from megatron-core's own provider. The two write checkpoints with the same
keys.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_eagle.compat.liger import liger_ops
from megatron_eagle.compat.mlp_submodule import mlp_submodule
from megatron_eagle.model.attention import BatchedAttention, core_over_packs
from megatron_eagle.model.build_context import AttentionCore, Kernels, TransformerImpl
from megatron_eagle.model.norm import LayerNorm, RMSNorm

# Transformer Engine keeps a norm inside the linear layer behind it; checkpoints use its names.
NORMS_IN_CHECKPOINTS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def block_spec(
    impl: TransformerImpl,
    *,
    layers: int,
    rms_norm: bool,
    mask: AttnMaskType,
    kernels: Kernels = "torch",
    attention: AttentionCore = "packed",
    residual: ModuleSpec | None = None,
) -> TransformerBlockSubmodules:
    """A pre-norm transformer of ``layers`` layers with a norm behind the last one.

    rms_norm: RMSNorm (Qwen) or LayerNorm (encoders); mask: causal for the packed language model, no_mask for an
    encoder. residual: what adds a sublayer's output to its input; None for Megatron's bias-dropout-add.
    """
    add = residual or get_bias_dropout_add
    over_packs = core_over_packs(attention, kernels)
    if impl == "transformer_engine":
        return _transformer_engine(layers, mask, over_packs, add)
    local = _liger() if rms_norm and kernels == "triton" else _Local(norm=RMSNorm if rms_norm else LayerNorm)
    layer = TransformerLayerSubmodules(
        input_layernorm=local.norm,
        self_attention=ModuleSpec(
            module=local.attention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=over_packs if mask == AttnMaskType.causal else BatchedAttention,
                linear_proj=RowParallelLinear,
            ),
        ),
        self_attn_bda=add,
        pre_mlp_layernorm=local.norm,
        mlp=mlp_submodule(ColumnParallelLinear, RowParallelLinear, local.activation),
        mlp_bda=add,
        sharded_state_dict_keys_map=NORMS_IN_CHECKPOINTS,
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=local.norm)


@dataclass(frozen=True)
class _Local:
    """What differs between local layers; activation: None for the one of the config."""

    norm: type
    attention: type = SelfAttention
    activation: type | None = None


def _liger() -> _Local:
    liger_ops()  # says what is missing
    from megatron_eagle.model.liger import LigerRMSNorm, LigerSwiGLU, RotarySelfAttention  # needs Triton

    return _Local(LigerRMSNorm, RotarySelfAttention, LigerSwiGLU)


def _transformer_engine(
    layers: int, mask: AttnMaskType, over_packs: ModuleSpec, add: Any
) -> TransformerBlockSubmodules:
    """The same layer in Transformer Engine's modules. Built by the tests, not run without a GPU."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    modules = TESpecProvider()
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=modules.column_parallel_layer_norm_linear(),
                core_attention=over_packs if mask == AttnMaskType.causal else modules.core_attention(),
                linear_proj=modules.row_parallel_linear(),
            ),
        ),
        self_attn_bda=add,
        pre_mlp_layernorm=IdentityOp,
        mlp=mlp_submodule(modules.column_parallel_layer_norm_linear(), modules.row_parallel_linear()),
        mlp_bda=add,
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=modules.layer_norm())
