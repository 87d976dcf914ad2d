"""compat/liger.py."""

import inspect

import pytest
from contracts import contract

pytest.importorskip("triton", reason="Liger-Kernel's kernels are Triton's, which has no wheel for this platform")

ARGUMENTS = {
    ("rms_norm", "LigerRMSNormFunction"): ["X", "W", "eps", "offset", "casting_mode", "in_place", "row_mode"],
    ("swiglu", "LigerFusedGateUpSiLUMulFunction"): ["y", "in_place"],
    ("rope", "LigerRopeFunction"): ["q", "k", "cos", "sin", "position_ids", "unsqueeze_dim", "rotary_dim"],
}


@pytest.mark.parametrize(("module", "function"), ARGUMENTS)
@contract("Liger-Kernel's {function} no longer takes the arguments that model/liger.py gives it, in that order")
def test_contract_arguments(module: str, function: str) -> None:
    import importlib

    found = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function)
    forward = inspect.unwrap(found.forward)
    assert list(inspect.signature(forward).parameters)[1:] == ARGUMENTS[module, function]


@contract("Liger-Kernel's RMSNorm no longer calls its module's rsqrt: compat/liger.py replaces it in the interpreter")
def test_contract_rsqrt() -> None:
    from liger_kernel.ops import rms_norm

    assert callable(rms_norm.rsqrt) and "rsqrt(" in inspect.getsource(rms_norm._rms_norm_forward_kernel.fn)
