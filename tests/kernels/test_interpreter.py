"""The correction of bfloat16 in Triton's interpreter, against PyTorch's own bfloat16 arithmetic bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from eagle_kernels.checking.interpreter import narrow, widen

pytestmark = pytest.mark.interpreter
SIZE = 512


@triton.jit
def _elementwise(x, y, combined, selected, rounded, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i, mask=i < SIZE - 1, other=3.0)
    tl.store(combined + i, a * 2.0 + b)
    tl.store(selected + i, tl.where(a > b, -a, tl.abs(b)))
    tl.store(rounded + i, a.to(tl.float32) * 1.37)


@triton.jit
def _products(x, y, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    a = tl.load(x + r[:, None] * COLUMNS + c[None, :])
    b = tl.load(y + r[None, :] * COLUMNS + c[:, None])
    tl.store(out + r[:, None] * ROWS + r[None, :], tl.dot(a, b))


@triton.jit
def _atomic(x):
    tl.atomic_add(x, tl.load(x))


def blocks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SIZE, generator=generator).bfloat16() for _ in range(2))
    return x, y


def test_elementwise_operations_and_casts_are_those_of_torch():
    x, y = blocks()
    combined, selected, rounded = (torch.full_like(x, float("nan")) for _ in range(3))
    _elementwise[(1,)](x, y, combined, selected, rounded, SIZE)
    y[-1] = 3.0  # the filler of the masked load
    assert torch.equal(combined, x * 2.0 + y)
    assert torch.equal(selected, torch.where(x > y, -x, y.abs()))
    assert torch.equal(rounded, (x.float() * 1.37).bfloat16())


def test_products_are_accumulated_in_float32():
    x, y = (block.view(16, 32) for block in blocks())
    out = torch.full((16, 16), float("nan"))
    _products[(1,)](x, y, out, 16, 32)
    assert torch.allclose(out, x.float() @ y.float().T, atol=1e-5)


def test_atomics_are_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="bfloat16 atomics"):
        _atomic[(1,)](torch.ones(1, dtype=torch.bfloat16))


def test_rounding_is_that_of_torch_for_every_kind_of_number():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40])])
    ours = torch.from_numpy(widen(narrow(values.numpy())).copy())
    assert torch.equal(ours.nan_to_num(7.0), values.bfloat16().float().nan_to_num(7.0))
    assert torch.equal(ours.isnan(), values.isnan())


def test_memory_is_poisoned():
    """Every way in which the kernels' launchers ask for memory; without this an element never written could pass."""
    tensor = torch.zeros(3, 4)
    fresh = [tensor.new_empty(5), tensor.new_empty_strided((2, 3), (3, 1)), torch.empty(5), torch.empty_like(tensor)]
    assert all(memory.isnan().all() for memory in fresh)
