"""What eagle_kernels/checking/interpreter.py replaces inside Triton to compute as a GPU does without one."""

import pytest
from triton.runtime import interpreter

REPLACED = [
    "_get_np_dtype",
    "_implicit_cvt",
    "_validate_np_data_size",
    "_interpreter.load",
    "_interpreter.store",
    "TensorHandle.__post_init__",
    "InterpreterBuilder.create_masked_load",
    "InterpreterBuilder.create_masked_store",
    "InterpreterBuilder.create_atomic_rmw",
    "InterpreterBuilder.cast_impl",
    "InterpreterBuilder.create_fp_to_fp",
    "InterpreterBuilder.create_bitcast",
    "InterpreterBuilder.create_fabs",
]


@pytest.mark.parametrize("path", REPLACED)
def test_contract_names_that_are_replaced(path):
    found = interpreter
    for name in path.split("."):
        assert hasattr(found, name), (
            f"Triton's interpreter no longer has {path}: eagle_kernels/checking/interpreter.py replaces or calls it, "
            "because bfloat16 blocks are raw bits there and float arguments no tensors"
        )
        found = getattr(found, name)
