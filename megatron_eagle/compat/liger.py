"""Liger-Kernel's autograd functions for RMSNorm, SwiGLU and rotary positions.

Leaned on: the classes in the modules of ``liger_kernel.ops`` and the order of their arguments. They are taken from the
modules because the package's own names may be replaced by an environment variable. In Triton's interpreter RMSNorm's
module has to be given another ``rsqrt``: the one that it imports is CUDA's, of which the interpreter has only the name.
"""

import functools
from typing import Any, NamedTuple

from megatron_eagle.errors import UserError


class LigerOps(NamedTuple):
    """rms_norm(x, weight, eps, offset, casting, in_place, row_mode); swiglu(gate_and_up, in_place);
    rope(query, key, cos, sin, position_ids, unsqueeze_dim, rotary_dim)."""

    rms_norm: Any
    swiglu: Any
    rope: Any


@functools.cache
def liger_ops() -> LigerOps:
    """The functions, imported when a model is built with them: they import Triton, which a CPU may lack.

    UserError if Liger-Kernel or Triton is not installed.
    """
    try:
        from eagle_kernels.device import INTERPRETED
        from liger_kernel.ops import rms_norm, rope, swiglu
    except ImportError as error:
        raise UserError(
            f"model.kernels: triton with transformer_impl: local takes RMSNorm, SwiGLU and rotary positions from "
            f"Liger-Kernel ({error}): pip install liger-kernel, or model.kernels=torch"
        ) from None
    if INTERPRETED:
        _fit_for_the_interpreter(rms_norm)
    return LigerOps(
        rms_norm.LigerRMSNormFunction.apply, swiglu.LigerFusedGateUpSiLUMulFunction.apply, rope.LigerRopeFunction.apply
    )


def _fit_for_the_interpreter(rms_norm: Any) -> None:
    import triton.language as tl
    from eagle_kernels.checking.interpreter import correct_scalars

    correct_scalars()
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # looked up when called: the interpreter replaces it for each launch
