"""BuildContext: what all modules of a model need to know about where and how they run, and Megatron's config of it.

Megatron hands one large TransformerConfig to every module. Eagle has three kinds of them - the language model, spread
over the pipeline, and the encoders and connector, which live on its first stage only - so the shared half is said once
here, and each module adds the numbers of its own architecture.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_eagle.config.fp8 import FORMATS, Fp8Recipe
from megatron_eagle.config.layout import Layout

TransformerImpl = Literal["local", "transformer_engine"]
Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full", "offload"]
Kernels = Literal["torch", "triton"]
AttentionCore = Literal["packed", "varlen", "te"]

_WHOLE_LAYERS = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": _WHOLE_LAYERS,
    "offload": _WHOLE_LAYERS,
}


@dataclass(frozen=True)
class BuildContext:
    """How a model runs.

    groups: Megatron's process groups tp, pp, cp, hcp and embd of this process.
    recompute: activations computed again in the backward pass: none, those of the attention core, or whole layers;
        ``offload`` also recomputes whole layers and keeps what they start from in host memory.
    recompute_layers: with ``full``, how many decoder layers of each (virtual) pipeline stage are, its first ones, and
        no other module's; None for all that there are.
    kernels: ``triton`` takes this project's kernels where it has one: preparing tiles for the encoders, joining their
        tokens with the connector's norm, attention over packs, and the loss without the logits of a whole pack; and
        Liger-Kernel's in the language model, see ``liger``. ``torch`` computes the same with PyTorch's operations.
    attention: whose attention over packs (``attention.core_over_packs``).
    fp8: how the language model's linear layers multiply, if in fp8; the encoders, the connector, embeddings and output
        layer do not: the former see any number of tiles and channels, the latter decide the loss.
    """

    layout: Layout
    groups: ProcessGroupCollection
    transformer_impl: TransformerImpl = "local"
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    kernels: Kernels = "torch"
    attention: AttentionCore = "packed"
    fp8: Fp8Recipe | None = None
    recompute_layers: int | None = None

    @property
    def liger(self) -> bool:
        """Whether the language model's RMSNorm, SwiGLU and rotary positions are Liger-Kernel's."""
        return self.transformer_impl == "local" and self.kernels == "triton"

    @property
    def recomputes_layers(self) -> bool:
        """Whether modules outside the pipeline compute their layers again."""
        return self.recompute in ("full", "offload") and self.recompute_layers is None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def transformer_config(build: BuildContext, *, in_pipeline: bool, **architecture: Any) -> TransformerConfig:
    """Megatron's config of one transformer.

    in_pipeline: True for the language model, whose layers are split over the pipeline stages and whose activations may
        be split along the sequence (sequence and context parallelism); False for what lives whole on the first stage.
    architecture: TransformerConfig's own fields, e.g. ``num_layers``.
    """
    layout = build.layout
    shared = _shared(build) | {
        "init_method": no_init,
        "output_layer_init_method": no_init,
        "embedding_init_method": no_init,
        "attention_softmax_in_fp32": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # The trainer sums weighted token losses itself; must be known before DistributedDataParallel is built.
        "calculate_per_token_loss": True,
        # Rotary fusion needs Transformer Engine; the fused loss would round gradients to bf16.
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    if in_pipeline:
        shared |= {
            "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": layout.vpp,
            "pipeline_model_parallel_layout": _pipeline_layout(layout),
            "sequence_parallel": layout.sequence_parallel,
            "context_parallel_size": layout.cp,
            # Megatron's TransformerBlock enters Transformer Engine's context around its layers.
            **({"fp8": FORMATS[build.fp8], "fp8_recipe": build.fp8} if build.fp8 else {}),
        }
    return TransformerConfig(**shared | _recompute(build, in_pipeline=in_pipeline) | architecture)


def _recompute(build: BuildContext, *, in_pipeline: bool) -> dict[str, Any]:
    """What is computed again, in Megatron's words."""
    if build.recompute_layers is None:
        return _RECOMPUTE[build.recompute]
    some = {"recompute_method": "block", "recompute_num_layers": build.recompute_layers}
    return _WHOLE_LAYERS | some if in_pipeline else _RECOMPUTE["none"]


def parallel_config(build: BuildContext) -> ModelParallelConfig:
    """Megatron's config of tensor-parallel layers that are no transformer; they live whole on the first stage."""
    return ModelParallelConfig(**_shared(build))


def no_init(weight: torch.Tensor) -> None:
    """The initialiser given to Megatron: leaves memory as it is, because ``weights.initialise`` draws the values."""


def _shared(build: BuildContext) -> dict[str, Any]:
    layout = build.layout
    return {
        "tensor_model_parallel_size": layout.tp,
        "params_dtype": build.dtype,
        "pipeline_dtype": build.dtype,
        "bf16": build.precision == "bf16",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,  # needs apex
        # Interleaved stages with batched sends cross each other when pp=2 and train on wrong activations.
        "batch_p2p_comm": layout.vpp is None,
        "overlap_p2p_comm": layout.vpp is not None,
    }


def _pipeline_layout(layout: Layout) -> list[list[str]] | None:
    """``layers_per_stage`` in Megatron's words: which parts each stage holds, in the order layers are run."""
    if layout.layers_per_stage is None:
        return None
    stages = [["decoder"] * layers for layers in layout.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
