"""How packed_attention is checked: values against float64, every block choice built, operations counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_kernels.checking.registry import Check, Compilation, KernelEntry, Roofline
from eagle_kernels.packed_attention import (
    AttentionBlocks,
    Blocks,
    kernels,
    packed_attention_with_log_sum_exp,
    reference,
    tile_attention,
)
from eagle_kernels.packed_attention.blocks import choose_blocks, padded_head_dim

SMALL = AttentionBlocks(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1))  # many blocks in short packs


@dataclass(frozen=True)
class Case:
    """One pack: segment lengths, query heads and key heads, and what else ``packed_attention`` can be told.

    ``rows``: positions of the queries, if a rank holds only some. ``fused``: query, key and value are slices of one
    tensor.
    """

    lengths: Sequence[int]
    heads: int = 2
    groups: int = 1
    head_dim: int = 64
    causal: bool = True
    rows: Sequence[int] | None = None
    fused: bool = False
    blocks: AttentionBlocks | None = SMALL

    def borders(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)


def worst_error(device: torch.device, dtype: torch.dtype, case: Case) -> float:
    """The largest error of output, log-sum-exp and their gradients over (1 + the reference's magnitude), in float64."""
    cu_seqlens = case.borders().to(device)
    rows = None if case.rows is None else torch.tensor(case.rows, dtype=torch.int32, device=device)
    query, key, value = _inputs(case, device, dtype)
    generator = torch.Generator().manual_seed(1)
    d_output = torch.randn(query.shape, generator=generator).to(device, dtype)
    d_lse = torch.randn(query.shape[1::-1], generator=generator).to(device)
    options = {"causal": case.causal, "query_positions": rows}

    def with_gradients(
        function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, **more: object
    ) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output, lse = function(*leaves, cu_seqlens, **options, **more)
        seen = torch.where(lse.isfinite(), lse, 0.0)  # -inf, of rows that see nothing, has no gradient
        total = (output.double() * d_output.double()).sum() + (seen.double() * d_lse.double()).sum()
        return [output, lse, *torch.autograd.grad(total, leaves)]

    got = with_gradients(packed_attention_with_log_sum_exp, query, key, value, blocks=case.blocks)
    expected = with_gradients(reference.packed_attention, query.double(), key.double(), value.double())
    return _difference(got, expected)


def tile_error(device: torch.device, dtype: torch.dtype, tiles: int, tokens: int, head_dim: int) -> float:
    """The same for SigLIP's attention inside each tile, forward only."""
    case = Case([tokens] * tiles, heads=2, groups=2, head_dim=head_dim, causal=False)
    query, key, value = (tensor.unflatten(0, (tiles, tokens)) for tensor in _inputs(case, device, dtype))
    q, k, v = (tensor.flatten(0, 1).double() for tensor in (query, key, value))
    expected, _ = reference.packed_attention(q, k, v, case.borders().to(device), causal=False)
    return _difference([tile_attention(query, key, value).flatten(0, 1)], [expected])


def repeat_difference(device: torch.device, case: Case) -> float:
    """How many elements of the gradients differ between two runs on the same input; must be 0, bit for bit."""
    q, k, v = (tensor.requires_grad_() for tensor in _inputs(case, device, torch.bfloat16))
    runs = []
    for _ in range(2):
        output, lse = packed_attention_with_log_sum_exp(q, k, v, case.borders().to(device), blocks=case.blocks)
        runs.append([output, lse, *torch.autograd.grad(output.float().square().sum(), (q, k, v))])
    return float(sum(int((a != b).sum()) for a, b in zip(*runs, strict=True)))


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(case.lengths) * 100 + case.head_dim)
    keys = sum(case.lengths)
    queries = keys if case.rows is None else len(case.rows)
    counts = (case.heads, case.groups, case.groups)
    if case.fused:
        whole = torch.randn(keys, sum(counts), case.head_dim, generator=generator).to(device, dtype)
        return list(whole.split(counts, dim=1))
    lengths = (queries, keys, keys)
    return [
        torch.randn(length, count, case.head_dim, generator=generator).to(device, dtype)
        for length, count in zip(lengths, counts, strict=True)
    ]


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    errors = [torch.zeros(1, dtype=torch.float64)]
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b).abs() / (1 + b.abs())
        errors.append(torch.where(a.double() == b, 0.0, error).detach().flatten().cpu())  # -inf agrees with -inf
    return torch.cat(errors).max().item()


def zigzag(length: int, ranks: int, rank: int) -> list[int]:
    """Positions of one rank when the pack is cut into 2 * ranks chunks and each rank takes one from either end."""
    chunk = length // (2 * ranks)
    late = 2 * ranks - 1 - rank
    return [*range(rank * chunk, (rank + 1) * chunk), *range(late * chunk, (late + 1) * chunk)]


def _check(label: str, tolerance: float, dtype: torch.dtype, case: Case) -> Check:
    return Check(label, lambda device: worst_error(device, dtype, case), tolerance)


# float32: rounding of sums. 16 bits: probabilities and score gradients are rounded before they are multiplied.
FP32, BF16, FP16 = 1e-5, 2e-2, 3e-3
RAGGED = [5, 0, 40, 1, 1, 33, 16]
CHECKS = (
    _check("fp32, ragged, GQA", FP32, torch.float32, Case(RAGGED, heads=4, groups=2)),
    _check("fp32, one-token segments", FP32, torch.float32, Case([1] * 20 + [13], head_dim=16)),
    _check("fp32, head dim 72, not causal", FP32, torch.float32, Case([32, 32], head_dim=72, causal=False)),
    _check("fp32, head dim 80, fused QKV", FP32, torch.float32, Case([30, 11], head_dim=80, fused=True)),
    _check("fp32, head dim 128, default blocks", FP32, torch.float32, Case([70], heads=1, head_dim=128, blocks=None)),
    _check("fp32, zigzag rank 1 of 2", FP32, torch.float32, Case([9, 90, 29], rows=zigzag(128, 2, 1))),
    _check("fp32, rows in any order", FP32, torch.float32, Case([9, 23], rows=[31, 2, 17, 5, -1, 40, 9, 8])),
    _check("bf16, ragged, GQA", BF16, torch.bfloat16, Case(RAGGED, heads=3, groups=1)),
    _check("fp16, ragged", FP16, torch.float16, Case(RAGGED)),
    Check("fp32, 3 tiles", lambda device: tile_error(device, torch.float32, 3, 16, 72), FP32),
    Check("no tiles", lambda device: tile_error(device, torch.float32, 0, 16, 72), 0.0),
)
LONG = [1000, 1, 777, 1240, 2, 64, 1012]  # 4096 tokens
LONG_GQA = Case(LONG, heads=7, groups=1, head_dim=128, fused=True, blocks=None)
GPU_CHECKS = (
    *(
        _check(f"bf16, head dim {d}, 4096 tokens", BF16, torch.bfloat16, Case(LONG, 4, 2, d, causal, blocks=None))
        for d, causal in ((64, True), (72, False), (80, False), (128, True))
    ),
    _check("fp16, head dim 128", FP16, torch.float16, Case(LONG, 4, 2, 128, blocks=None)),
    _check(
        "bf16, zigzag rank 2 of 4", BF16, torch.bfloat16, Case(LONG, 4, 2, 128, rows=zigzag(4096, 4, 2), blocks=None)
    ),
    _check("bf16, fused QKV, 7 heads a group", BF16, torch.bfloat16, LONG_GQA),
    Check("bf16, two runs give the same bits", lambda device: repeat_difference(device, LONG_GQA), 0.0),
    Check("bf16, SigLIP, 26 tiles", lambda device: tile_error(device, torch.bfloat16, 26, 1024, 72), BF16),
)

_INTEGERS = ("segments", "queries", "keys", "heads", "group", "key_heads", "splits")
_ROW_STRIDES = tuple(f"{name}_row" for name in ("query", "key", "value", "output"))
_HEAD_STRIDES = tuple(f"{name}_head" for name in ("query", "key", "value", "output"))
_FLOATS = ("log_sum_exp", "log_sum_exp_gradient", "delta")


def compilations() -> list[Compilation]:
    """Every block choice: per GPU generation wide, with positions, padded, and narrow (with positions, the dearer
    case).
    """
    built = []
    for architecture in (80, 90, 100):
        built += _builds(architecture, 128, causal=True)
        built += _builds(architecture, 128, causal=True, positions=True)
        built += _builds(architecture, 72, causal=False)
        built += _builds(architecture, 64, causal=True, positions=True)
    return [*built, *_builds(90, 128, causal=True, dtype="fp32")]


def _builds(
    architecture: int, head_dim: int, *, causal: bool, positions: bool = False, dtype: str = "bf16"
) -> list[Compilation]:
    chosen = choose_blocks(head_dim, 4 if dtype == "fp32" else 2, divmod(architecture, 10), positions)
    return [
        _compilation(name, kernel, blocks, architecture, head_dim, causal, positions, dtype)
        for name, kernel, blocks in (
            ("forward", kernels.attention_forward, chosen.forward),
            ("dQ", kernels.attention_query_gradient, chosen.query_gradient),
            ("dK dV", kernels.attention_key_gradients, chosen.key_gradients),
        )
    ]


def _compilation(
    name: str,
    kernel: object,
    blocks: Blocks,
    architecture: int,
    head_dim: int,
    causal: bool,
    positions: bool,
    dtype: str,
) -> Compilation:
    constexprs: dict[str, object] = {
        "CAUSAL": causal,
        "HAS_POSITIONS": positions,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
    }
    constexprs |= dict.fromkeys(_HEAD_STRIDES, head_dim)
    if not positions:
        constexprs["query_positions"] = None
    names = kernel.arg_names  # type: ignore[attr-defined]
    if "HAS_LSE_GRADIENT" in names:
        constexprs |= {"HAS_LSE_GRADIENT": False, "log_sum_exp_gradient": None}
    kinds = dict.fromkeys(_INTEGERS + _ROW_STRIDES, "i32") | dict.fromkeys(_FLOATS, "*fp32") | {"softmax_scale": "fp32"}
    kinds |= dict.fromkeys(("cu_seqlens", "query_positions"), "*i32")
    signature = {name: kinds.get(name, f"*{dtype}") for name in names if name not in constexprs}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name in _ROW_STRIDES)
    mode = ("causal" if causal else "full") + (", positions" if positions else "")
    shape = f"{blocks.queries}x{blocks.keys}, {blocks.warps} warps, {blocks.stages} stages"
    return Compilation(
        f"{name} {dtype} {head_dim} {mode} ({shape})",
        kernel,
        signature,
        constexprs,
        aligned,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        needs_wgmma=dtype != "fp32",
        architectures=(architecture,),
    )


def roofline(lengths: Sequence[int], heads: int, groups: int, head_dim: int, causal: bool, backward: bool) -> Roofline:
    """bfloat16. Two matrix products forward; backward five plus the two that dQ and dK/dV each make again.

    The two repeated products are counted, because they are the price of needing no atomic additions.
    """
    pairs = sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
    products = 7 if backward else 2
    rows = sum(lengths)
    query_side, key_side = (4, 4) if backward else (2, 2)  # q, out, d out, dq; k, v, dk, dv: each once
    return Roofline(
        bytes_moved=2 * rows * head_dim * (query_side * heads + key_side * groups),
        operations=products * 2 * pairs * heads * head_dim,
    )


PACK = [1024] * 16
TILES = [1024] * 26
ENTRY = KernelEntry(
    name="packed_attention",
    checks=CHECKS,
    compilations=compilations,
    rooflines={
        "Qwen2.5-7B, 16 segments of 1024, 28/4 heads of 128, forward": roofline(PACK, 28, 4, 128, True, False),
        "Qwen2.5-7B, the same, backward": roofline(PACK, 28, 4, 128, True, True),
        "SigLIP, 26 tiles of 1024, 16 heads of 72, forward": roofline(TILES, 16, 16, 72, False, False),
        "SigLIP, the same, backward": roofline(TILES, 16, 16, 72, False, True),
    },
    gpu_checks=GPU_CHECKS,
)
