"""packed_attention against float64, on ragged packs in poisoned memory; and whether these tests can fail."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from eagle_kernels.checking.ahead_of_time import _source
from eagle_kernels.device import INTERPRETED
from eagle_kernels.packed_attention import (
    AttentionBlocks,
    Blocks,
    PackedAttention,
    kernels,
    masks,
    op,
    packed_attention,
    reference,
    tile_attention,
)
from eagle_kernels.packed_attention import packed_attention_with_log_sum_exp as with_log_sum_exp
from eagle_kernels.packed_attention.blocks import choose_blocks
from eagle_kernels.packed_attention.entry import (
    BF16,
    FP16,
    FP32,
    GPU_CHECKS,
    SMALL,
    Case,
    compilations,
    worst_error,
    zigzag,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

interpreter = pytest.mark.interpreter
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until something is written, so an element that a kernel forgets cannot pass."""
    torch.use_deterministic_algorithms(True)  # PyTorch fills memory in this mode only
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segment_by_segment(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """PyTorch's own attention, one segment at a time."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_attention_per_segment(causal):
    lengths = [5, 1, 17]
    query, key, value = (draw(23, heads, 8, seed=heads).double() for heads in (4, 2, 2))
    borders = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    output, lse = reference.packed_attention(query, key, value, borders, causal=causal)
    torch.testing.assert_close(output, segment_by_segment(query, key, value, lengths, causal))
    scores = query[6:, 3] @ key[6:, 1].T / 8**0.5
    torch.testing.assert_close(lse[3, 22], torch.logsumexp(scores[-1], 0))


@st.composite
def cases(draw_: st.DrawFn) -> tuple[Case, torch.dtype]:
    lengths = draw_(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 45)), max_size=5))
    groups = draw_(st.integers(1, 2))
    total = sum(lengths)
    rows = draw_(st.none() | st.lists(st.integers(-2, total + 3), max_size=40) | st.just(zigzag(total, 2, 0)))
    case = Case(
        lengths,
        heads=groups * draw_(st.integers(1, 3)),
        groups=groups,
        head_dim=draw_(st.sampled_from([16, 24, 64])),
        causal=draw_(st.booleans()),
        rows=rows,
        fused=rows is None and draw_(st.booleans()),
    )
    return case, draw_(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))


@interpreter
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(cases())
def test_values_and_gradients(drawn):
    case, dtype = drawn
    with poisoned_memory():
        assert worst_error(CPU, dtype, case) <= TOLERANCE[dtype]


@interpreter
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_empty_packs(lengths):
    assert worst_error(CPU, torch.float32, Case(lengths)) == 0.0
    assert worst_error(CPU, torch.float32, Case([12], rows=[])) == 0.0


@interpreter
def test_tiles_and_module_are_the_same_attention():
    query, key, value = (draw(2, 16, 2, 24, seed=seed) for seed in range(3))
    expected = segment_by_segment(*(x.flatten(0, 1) for x in (query, key, value)), [16, 16], causal=False)
    torch.testing.assert_close(tile_attention(query, key, value).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    borders = torch.tensor([0, 16, 32], dtype=torch.int32)
    module = PackedAttention(causal=False)
    got = module(*(x.flatten(0, 1) for x in (query, key, value)), borders)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@interpreter
def test_softmax_scale():
    query, key, value = (draw(9, 1, 16, seed=seed) for seed in range(3))
    borders = torch.tensor([0, 9], dtype=torch.int32)
    got = packed_attention(query, key, value, borders, softmax_scale=0.7)
    expected, _ = reference.packed_attention(query, key, value, borders, softmax_scale=0.7)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@interpreter
def test_parts_of_the_keys_can_be_joined_by_their_log_sum_exp():
    """What ring attention does: the gradient has to flow through the log-sum-exp as well."""
    query, key, value = (draw(20, 2, 16, seed=seed).requires_grad_() for seed in range(3))
    rows = torch.zeros(20, dtype=torch.int32)
    halves = [
        with_log_sum_exp(query, k, v, torch.tensor([0, 10], dtype=torch.int32), causal=False, query_positions=rows)
        for k, v in zip(key.split(10), value.split(10), strict=True)
    ]
    shares = torch.softmax(torch.stack([lse for _, lse in halves]), 0).transpose(1, 2)
    joined = sum(share[..., None] * output for share, (output, _) in zip(shares, halves, strict=True))
    got = [joined, *torch.autograd.grad(joined.square().sum(), [query, key, value])]
    whole, _ = reference.packed_attention(query, key, value, torch.tensor([0, 20]), causal=False)
    expected = [whole, *torch.autograd.grad(whole.square().sum(), [query, key, value])]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the NaN
@pytest.mark.parametrize("rows", [None, [*range(24, 32), *range(96, 104)]], ids=["all rows", "both ends in a block"])
def test_blocks_of_other_segments_are_never_visited(rows):
    """Segments 1 and 2 of four hold NaN: a single block of theirs, even with weight 0, would poison the neighbours."""
    segment, blocks = 32, AttentionBlocks(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1))
    borders = torch.arange(5, dtype=torch.int32) * segment
    bad = slice(segment, 3 * segment)
    key, value = draw(128, 1, 16, seed=1), draw(128, 1, 16, seed=2)
    key[bad], value[bad] = float("nan"), float("nan")
    query = draw(128, 2, 16) if rows is None else draw(len(rows), 2, 16)
    d_output = torch.ones_like(query)
    if rows is None:
        query[bad], d_output[bad] = float("nan"), float("nan")
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    positions = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    output = packed_attention(*leaves, borders, query_positions=positions, blocks=blocks)
    gradients = torch.autograd.grad(output, leaves, d_output)
    for tensor in (output, *gradients):
        good = torch.ones(len(tensor), dtype=torch.bool)
        if len(tensor) == 128:
            good[bad] = False
        assert tensor[good].isfinite().all()


@interpreter
def test_wrong_borders_read_nothing_outside():
    for borders in ([0, 500], [-40, 9], [7, 3, 12]):
        tensors = [draw(12, 1, 16, seed=seed).requires_grad_() for seed in range(3)]
        output = packed_attention(*tensors, torch.tensor(borders, dtype=torch.int32), blocks=SMALL)
        output.sum().backward()
        assert output.isfinite().all()


MUTATED_MASKS = {
    "segment bound one too low": ("border <= positions", "border < positions"),
    "segment end one too high": ("tl.where(inside, end, 0)", "tl.where(inside, tl.minimum(end + 1, keys), 0)"),
    "causal one too far": ("positions + 1)", "positions + 2)"),
    "tail of the keys dropped": ("tl.cdiv(tl.maximum(high - low, 0), BLOCK)", "tl.maximum(high - low, 0) // BLOCK"),
    "a block too many without mask": ("(earliest_end - low) // BLOCK -", "tl.cdiv(earliest_end - low, BLOCK) -"),
    "gap between the parts misjudged": ("tl.where(parted, gap_end, high)", "tl.where(parted, gap_end + 1, high)"),
    "last row that sees a key forgotten": ("tl.where(hit, rows + 1, 0)", "tl.where(hit, rows, 0)"),
}
MUTATED_KERNELS = {
    "keys seen by earlier queries": ("(seen_until > 0, columns, keys)", "(seen_until > 0, columns - 1, keys)"),
    "running sum not rescaled": ("weight * shrink + tl.sum", "weight + tl.sum"),
    "delta forgotten in dQ": ("probability * (wanted - delta[:, None])", "probability * wanted"),
    "a head of the group left out": ("heads = (split + 1) *", "heads = (split + 1) * (group - 1) // splits - 0 *"),
}


@interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # wrong kernels overflow
@pytest.mark.parametrize("mutation", [None, *MUTATED_MASKS, *MUTATED_KERNELS])
def test_a_mutated_kernel_is_caught(mutation, mutate, monkeypatch):
    if mutation in MUTATED_KERNELS:
        monkeypatch.setattr(op, "kernels", mutate(kernels, *MUTATED_KERNELS[mutation]))
    if mutation in MUTATED_MASKS:
        mutated = mutate(masks, *MUTATED_MASKS[mutation])
        for name, function in list(vars(mutated).items()):
            if isinstance(function, type(kernels.load_rows)) and hasattr(kernels, name):
                monkeypatch.setattr(kernels, name, function)
    ragged = Case([5, 20, 1, 33], heads=3, groups=1, head_dim=16)
    zigzagging = Case([17, 60, 51], heads=2, groups=1, head_dim=16, rows=zigzag(128, 4, 1))
    passed = all(worst_error(CPU, torch.float32, case) <= FP32 for case in (ragged, zigzagging))
    assert passed == (mutation is None), mutation or "the kernel as it stands"


@interpreter
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": draw(8, 3, 16), "value": draw(8, 3, 16)}, "2 query heads cannot share 3 key heads"),
        ({"value": draw(8, 1, 16).half()}, "all bfloat16, float16 or float32"),
        ({"value": draw(7, 1, 16)}, r"value \[7, 1, 16\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "contiguous int32"),
        ({"key": draw(9, 1, 16), "value": draw(9, 1, 16)}, "8 queries, 9 keys"),
        ({"query_positions": torch.zeros(7, dtype=torch.int32)}, r"int32 \[8\]"),
        ({"softmax_scale": 0.0}, "positive and finite, got 0.0"),
        ({"query": draw(8, 2, 160), "key": draw(8, 1, 160), "value": draw(8, 1, 160)}, "1 to 128, got 160"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(change, said):
    good = {"query": draw(8, 2, 16), "key": draw(8, 1, 16), "value": draw(8, 1, 16)}
    good["cu_seqlens"] = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=said):
        packed_attention(**(good | change))


def test_block_choices_follow_the_gpu():
    hopper, ampere = choose_blocks(128, 2, (9, 0), False), choose_blocks(128, 2, (8, 0), False)
    assert hopper.forward.queries > ampere.forward.queries
    assert choose_blocks(72, 2, (9, 0), False) != hopper
    assert choose_blocks(128, 2, (12, 0), False) == ampere  # a small Blackwell has no more shared memory than an Ampere


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
def test_built_for_hopper_loads_are_wide_and_nothing_is_atomic(tmp_path, monkeypatch):
    """Loops over key blocks must copy 16 bytes a thread in the background; an unlucky loop bound once cost exactly
    that.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wanted = ("bf16 128 causal (", "bf16 72 full (")
    chosen = [c for c in compilations() if c.architectures == (90,) and any(label in c.label for label in wanted)]
    assert len(chosen) == 6
    for compilation in chosen:
        options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
        ptx = triton.compile(_source(compilation), target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert ptx.count("cp.async.cg.shared.global [") >= 8, compilation.label
        assert "ld.global.b16" not in ptx, compilation.label
        assert not re.search(r"^\s*(@%p\d+ )?(atom|red)\.", ptx, re.MULTILINE), compilation.label


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("check", GPU_CHECKS, ids=lambda check: check.label)
def test_on_the_gpu(check):
    assert check.run(torch.device("cuda")) <= check.tolerance
