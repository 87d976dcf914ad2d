"""Makes Triton's CPU interpreter compute bfloat16 correctly, so that the dtype of training is tested without a GPU.

Triton keeps a bfloat16 block as its raw 16 bits in a numpy array of integers. Loads and stores are right; nearly
all else works on the integers and returns nonsense without an error (sums, comparisons, ``tl.dot``), and float32 ->
bfloat16 cuts off instead of rounding. Here a bfloat16 block is kept as float32 that holds bfloat16 values: narrowed
when stored, rounded to nearest even whenever an operation makes a new block. That is the arithmetic of the GPU for
casts, elementwise operations and products accumulated in float32; reductions in bfloat16 itself may round in another
order than on a GPU.

Arguments that are Python floats are another difference: a GPU's kernel gets a float32 of Triton's, which has methods.

The corrections replace private functions of Triton, hence the check of the version. Bfloat16 atomics stay unsupported.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from eagle_kernels.device import INTERPRETED

TESTED_TRITON = ("3.6.", "3.7.")
_state = {"corrected": False, "scalars": False}


def bfloat16_is_corrected() -> bool:
    """Whether ``correct_bfloat16`` was called in this process."""
    return _state["corrected"]


def correct_bfloat16() -> None:
    """Corrects bfloat16 for every kernel interpreted in this process from now on. Calling it again does nothing."""
    _require_tested_interpreter("bfloat16 is")
    if not _state["corrected"]:
        _replace_storage()
        _replace_memory()
        _replace_casts()
        _state["corrected"] = True


def correct_scalars() -> None:
    """Makes float arguments of every kernel interpreted from now on float32 of Triton's, as they are on a GPU.

    Kernels that only compute with them need it not; those that ask a float for its ``to`` do. Calling it again does
    nothing.
    """
    _require_tested_interpreter("float arguments are")
    if not _state["scalars"]:
        _replace_arguments()
        _state["scalars"] = True


def _require_tested_interpreter(subject: str) -> None:
    if not INTERPRETED:
        raise RuntimeError(
            "kernels are not interpreted in this process: set TRITON_INTERPRET=1 before triton is imported"
        )
    if not triton.__version__.startswith(TESTED_TRITON):
        raise RuntimeError(f"{subject} corrected for Triton {'x, '.join(TESTED_TRITON)}x, this is {triton.__version__}")


def widen(bits: np.ndarray) -> np.ndarray:
    """Raw bfloat16 bits (uint16) -> float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> raw bfloat16 bits (uint16), rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values, np.float32, order="C")
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


def _replace_arguments() -> None:
    convert = interpreter._implicit_cvt

    def corrected_convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = corrected_convert


def _replace_storage() -> None:
    """A bfloat16 handle holds float32 with values that bfloat16 has. (Comparisons carry the dtype of what they compare
    with boolean data: those are left alone.)"""
    numpy_dtype, fits = interpreter._get_np_dtype, interpreter._validate_np_data_size

    def corrected_dtype(dtype: Any) -> np.dtype:
        return np.dtype(np.float32) if _is_bfloat16(dtype) else numpy_dtype(dtype)

    def corrected_fits(data: np.ndarray, dtype: Any) -> bool:
        return data.dtype == np.float32 if _is_bfloat16(dtype) and data.dtype.kind == "f" else fits(data, dtype)

    def post_init(handle: Any) -> None:
        if _is_bfloat16(handle.dtype) and handle.data.dtype.kind == "f":
            handle.data = widen(narrow(handle.data))
        elif not corrected_fits(handle.data, handle.dtype):
            raise ValueError(f"numpy {handle.data.dtype} does not fit into {handle.dtype}")

    interpreter._get_np_dtype = corrected_dtype
    interpreter._validate_np_data_size = corrected_fits
    interpreter.TensorHandle.__post_init__ = post_init


def _replace_memory() -> None:
    """Memory holds the two bytes of a bfloat16, a handle the float32."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *hints: Any, **named: Any) -> Any:
        dtype = pointers.get_element_ty()
        if not _is_bfloat16(dtype):
            return load(self, pointers, mask, other, *hints, **named)
        if other is None:
            filler = np.zeros(pointers.data.shape, np.uint16)
        else:
            filler = np.broadcast_to(narrow(other.data), pointers.data.shape).copy()
        keep = np.broadcast_to(mask.data, pointers.data.shape).copy()
        bits = interpreter._interpreter.load(pointers.data, keep, filler, np.dtype(np.uint16))
        return handle(widen(bits), dtype)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *hints: Any, **named: Any) -> Any:
        if _is_bfloat16(pointers.get_element_ty()):
            return interpreter._interpreter.store(pointers.data, narrow(value.data), mask.data)
        return store(self, pointers, value, mask, *hints, **named)

    def atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if _is_bfloat16(value.dtype):
            raise TypeError("bfloat16 atomics are not interpreted: accumulate in float32")
        return atomic(self, operation, pointer, value, *rest)

    builder.create_masked_load = masked_load
    builder.create_masked_store = masked_store
    builder.create_atomic_rmw = atomic_rmw


def _replace_casts() -> None:
    """From bfloat16: the float32 it is held as. To bfloat16: float32, which the handle rounds."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, convert, bitcast, absolute = (
        builder.cast_impl,
        builder.create_fp_to_fp,
        builder.create_bitcast,
        builder.create_fabs,
    )

    def corrected_cast(self: Any, source: Any, target: Any) -> Any:
        if _is_bfloat16(target):
            return handle(source.data.astype(np.float32), tl.bfloat16)
        if _is_bfloat16(source.dtype):
            source = handle(source.data, tl.float32)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        return cast(self, source, target)

    def corrected_convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bfloat16(target) or _is_bfloat16(source.dtype):
            return corrected_cast(self, source, target)
        return convert(self, source, target, rounding)

    def corrected_bitcast(self: Any, source: Any, target: Any) -> Any:
        if _is_bfloat16(source.dtype):
            source = handle(narrow(source.data), tl.uint16)
        if _is_bfloat16(target):
            return handle(widen(source.data.view(np.uint16)), tl.bfloat16)
        return bitcast(self, source, target)

    def corrected_absolute(self: Any, value: Any) -> Any:
        return handle(np.abs(value.data), value.dtype) if _is_bfloat16(value.dtype) else absolute(self, value)

    def constant(self: Any, value: float) -> Any:
        return handle(np.array([value], np.float32), tl.bfloat16)

    builder.get_bf16 = constant  # Triton has none: a bfloat16 block times a Python number raises there
    builder.cast_impl = corrected_cast
    builder.create_fp_to_fp = corrected_convert
    builder.create_bitcast = corrected_bitcast
    builder.create_fabs = corrected_absolute
