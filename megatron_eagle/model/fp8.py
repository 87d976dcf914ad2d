"""Whether Transformer Engine can multiply in fp8 on this device, asked before anything is built."""

import importlib
import importlib.util

from megatron_eagle.config.fp8 import Fp8Recipe
from megatron_eagle.errors import UserError

_AVAILABLE: dict[Fp8Recipe, str] = {
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def require_fp8(recipe: Fp8Recipe, device: str) -> None:
    """UserError, with Transformer Engine's reason where it has one, if ``device`` cannot multiply by ``recipe``."""
    if device != "cuda":
        raise UserError(f"precision: fp8 computes on CUDA only, this is {device}: take bf16")
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "precision: fp8 needs Transformer Engine, which is not installed: pip install 'megatron-eagle[gpu]', "
            "or precision=bf16"
        )
    available, reason = getattr(importlib.import_module("transformer_engine.pytorch"), _AVAILABLE[recipe])(True)
    if not available:
        raise UserError(f"precision: fp8 with fp8_recipe: {recipe} cannot run here: {reason}")
