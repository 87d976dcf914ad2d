"""How linear_cross_entropy is checked: values against float64, both kernels built, operations and bytes counted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_kernels.checking.registry import Check, Compilation, KernelEntry, Roofline
from eagle_kernels.linear_cross_entropy import kernels, linear_cross_entropy, reference

QWEN = 152_064  # rows of Qwen2.5-7B's output weight, of which 151 665 are tokens and the rest is padding
QWEN_KNOWN = 151_665


@dataclass(frozen=True)
class Case:
    """Sizes; ``known``: true size of the vocabulary, default all; ``ignored``: share of rows without a label."""

    rows: int
    vocabulary: int
    hidden: int
    known: int | None = None
    ignored: float = 0.3
    rows_per_chunk: int = 4096
    scale: float = 0.3


def tensors(device: torch.device, dtype: torch.dtype, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, labels, token weights), the same on every device."""
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.hidden)
    hidden = torch.randn(case.rows, case.hidden, generator=generator)
    weight = torch.randn(case.vocabulary, case.hidden, generator=generator) * case.scale
    labels = torch.randint(case.known or case.vocabulary, (case.rows,), generator=generator)
    labels[torch.rand(case.rows, generator=generator) < case.ignored] = -100
    token_weights = torch.rand(case.rows, generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device), token_weights.to(device)


def worst_error(device: torch.device, dtype: torch.dtype, case: Case) -> float:
    """The largest error of loss, token losses, dHidden and dW, each over the largest magnitude of its reference."""
    hidden, weight, labels, token_weights = tensors(device, dtype, case)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = linear_cross_entropy(
        hidden, weight, labels, token_weights, vocabulary_size=case.known, rows_per_chunk=case.rows_per_chunk
    )
    loss, token_losses = reference.linear_cross_entropy(
        exact_hidden, exact_weight, labels, token_weights.double(), vocabulary_size=case.known
    )
    gradients = torch.autograd.grad(3 * losses.loss, (hidden, weight))
    exact_gradients = torch.autograd.grad(3 * loss, (exact_hidden, exact_weight))
    pairs = [(losses.loss, loss), (losses.tokens, token_losses), *zip(gradients, exact_gradients, strict=True)]
    errors = [torch.zeros(1, dtype=torch.float64)]
    for a, b in pairs:
        largest = b.abs().max().clamp(min=1e-12) if b.numel() else 1.0
        errors.append(((a.double() - b).abs() / largest).flatten().detach().cpu())
    return torch.cat(errors).max().item()


def _check(label: str, tolerance: float, dtype: torch.dtype, case: Case) -> Check:
    return Check(label, lambda device: worst_error(device, dtype, case), tolerance)


# float32: rounding of sums over the vocabulary. bfloat16: logits, gradients of logits and results are rounded.
FP32, BF16 = 5e-6, 1e-2
CHECKS = (
    _check("fp32, small", FP32, torch.float32, Case(13, 100, 24)),
    _check(
        "fp32, chunks of 5 rows, padded vocabulary", FP32, torch.float32, Case(20, 104, 24, known=91, rows_per_chunk=5)
    ),
    _check("fp32, V = 152 064", FP32, torch.float32, Case(8, QWEN, 64, known=QWEN_KNOWN)),
    _check("bf16, V = 152 064", BF16, torch.bfloat16, Case(8, QWEN, 64, known=QWEN_KNOWN)),
    _check("bf16, dW over 40 chunks", BF16, torch.bfloat16, Case(40, 100, 24, ignored=0.0, rows_per_chunk=1)),
    _check("fp32, nothing labelled", 0.0, torch.float32, Case(6, 100, 24, ignored=1.1)),
    _check("fp32, no rows", 0.0, torch.float32, Case(0, 100, 24)),
)
GPU_CHECKS = (
    _check(
        "bf16, 2048 rows, V = 152 064, H = 896", BF16, torch.bfloat16, Case(2048, QWEN, 896, QWEN_KNOWN, scale=0.03)
    ),
    _check("bf16, the same in 8 chunks", BF16, torch.bfloat16, Case(2048, QWEN, 896, QWEN_KNOWN, 0.3, 256, 0.03)),
)


def compilations() -> list[Compilation]:
    """Both kernels in both dtypes, at a vocabulary whose size allows loads of 16 bytes."""
    built = []
    integers = dict.fromkeys(("columns", "known", "vocabulary_start"), "i32")
    for dtype in ("bf16", "fp32"):
        for kernel, results in (
            (kernels.row_statistics, {"statistics": "*fp32"}),
            (kernels.logit_gradient, {"log_sum_exp": "*fp32", "token_weights": "*fp32"}),
        ):
            signature = {"logits": f"*{dtype}", "labels": "*i64"} | results | integers
            aligned = ("logits", "columns", *results)
            label = f"{kernel.fn.__name__} {dtype} (block {kernels.BLOCK}, {kernels.WARPS} warps)"
            constexprs: dict[str, object] = {"BLOCK": kernels.BLOCK}
            built.append(Compilation(label, kernel, signature, constexprs, aligned, kernels.WARPS))
    return built


def whole_roofline(rows: int, vocabulary: int, hidden: int) -> Roofline:
    """The whole, bfloat16: three matrix products; hidden, weight and their gradients cross the bus once."""
    return Roofline(bytes_moved=2 * 2 * (rows + vocabulary) * hidden, operations=6 * rows * vocabulary * hidden)


ENTRY = KernelEntry(
    name="linear_cross_entropy",
    checks=CHECKS,
    compilations=compilations,
    rooflines={
        "32 768 labelled rows, V = 152 064, H = 3584, forward and backward": whole_roofline(32_768, QWEN, 3584),
        "of which the two Triton kernels: logits read twice, written once": Roofline(3 * 2 * 32_768 * QWEN, 0),
    },
    gpu_checks=GPU_CHECKS,
)
