"""fp8: by which of Transformer Engine's recipes the language model multiplies, and what that asks of shapes.

Only recipes without a memory are here: each takes its scales from the very tensors that it multiplies. Those of
``delayed`` follow from earlier steps, which checkpoints do not hold, so that a run that was interrupted
would not go on as it would have without.
"""

from typing import Literal

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import QwenConfig

Fp8Recipe = Literal["tensorwise", "blockwise", "mxfp8"]  # names of megatron-core's TransformerConfig.fp8_recipe

# Transformer Engine's own choice for each: gradients of one scale a tensor need e5m2's range, others do not.
FORMATS: dict[Fp8Recipe, Literal["hybrid", "e4m3"]] = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
# What rows and columns of every product must be multiples of: 16 bytes for cuBLAS, or whole blocks with a scale each.
MULTIPLES: dict[Fp8Recipe, int] = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def check_shapes(recipe: Fp8Recipe, language: QwenConfig, layout: Layout, pack_length: int) -> None:
    """ValueError with the numbers if a process would multiply what ``recipe`` cannot."""
    multiple, tp = MULTIPLES[recipe], layout.tp
    split = layout.cp * (tp if layout.sequence_parallel else 1)
    if pack_length % (split * multiple):
        raise ValueError(
            f"fp8 ({recipe}) multiplies whole {multiple}s of tokens: a pack of {pack_length} over {split} processes "
            f"(cp={layout.cp}{f' x tp={tp}, sequence_parallel' if split > layout.cp else ''}) is no multiple of them"
        )
    heads = language.num_attention_heads + 2 * language.num_key_value_heads
    widths = {
        "hidden_size": language.hidden_size,
        f"hidden_size / tp={tp}": language.hidden_size / tp,
        f"queries, keys and values / tp={tp}": heads * language.head_dim / tp,
        f"intermediate_size / tp={tp}": language.intermediate_size / tp,
    }
    for name, width in widths.items():
        if width % multiple:
            raise ValueError(f"fp8 ({recipe}) multiplies whole {multiple}s of channels: {name} is {width:g}")
