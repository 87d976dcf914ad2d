"""Linear cross entropy as an autograd function: chunks of rows through cuBLAS and two Triton kernels.

Why gradients are made in the forward pass: both need the same logits. Made together, hidden x weight costs the three
matrix products of ordinary training (6 N V H operations for N labelled rows); throwing logits away and making them
again in the backward pass would cost a fourth, a third more time. The price is that the loss must be the end of the
graph: backward only multiplies by the gradient of the loss.

Per chunk of C rows: logits = hidden W^T (cuBLAS) into the one buffer [C, V]; maximum, sum of exponentials and label's
logit per row (one read); the gradient in place (one read, one write); dHidden = G W and dW += G^T hidden (cuBLAS,
accumulated in float32). Peak memory beside inputs and outputs, in bytes for 16-bit elements: 2 C V for the chunk, 4 V H
for dW. Bytes moved beyond the matrix products: about 10 N V.

With the vocabulary split over ranks, each computes its columns; three numbers per row are gathered (one collective
instead of a maximum and then a sum) and joined in the same order on every rank, and dHidden, to which every rank adds,
is reduced while dW is being computed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from eagle_kernels.device import require_device
from eagle_kernels.linear_cross_entropy import kernels

DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Settings:
    """The part of the vocabulary that ``weight`` holds, who holds the others, and how to go about it."""

    vocabulary_start: int
    vocabulary_size: int
    process_group: dist.ProcessGroup | None
    reduce_hidden_gradient: bool
    ignore_label: int
    rows_per_chunk: int


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(hidden, weight, labels, token_weights, settings) -> (loss, token losses); only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        rows = torch.nonzero(labels != settings.ignore_label).flatten()  # waits for the GPU, see the package
        _check_labels(labels, rows, settings)
        token_losses = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffer = hidden.new_empty(min(settings.rows_per_chunk, len(rows)), len(weight))
        with torch.cuda.device_of(hidden):
            for chunk in rows.split(settings.rows_per_chunk) if len(rows) else ():
                inputs, chunk_labels = hidden.index_select(0, chunk), labels.index_select(0, chunk)
                logits = torch.mm(inputs, weight.t(), out=buffer[: len(chunk)])
                log_sum_exp, target = _joined(_statistics(logits, chunk_labels, settings), settings.process_group)
                token_losses.index_copy_(0, chunk, log_sum_exp - target)
                if hidden_gradient is None and weight_gradient is None:
                    continue
                chunk_weights = token_weights.index_select(0, chunk)
                gradient = _to_gradient(logits, chunk_labels, log_sum_exp, chunk_weights, settings)
                if hidden_gradient is not None:
                    part = torch.mm(gradient, weight)
                    reduction = _start_reduction(part, settings)
                if weight_gradient is not None:
                    add_product(weight_gradient, gradient.t(), inputs)
                if hidden_gradient is not None:
                    if reduction is not None:
                        reduction.wait()
                    hidden_gradient.index_copy_(0, chunk, part)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(token_losses)
        return (token_losses * token_weights).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * loss_gradient
        if weight_gradient is not None:  # scaled and rounded in one pass
            rounded = torch.empty_like(weight_gradient, dtype=ctx.weight_dtype)
            weight_gradient = torch.mul(weight_gradient, loss_gradient, out=rounded)
        return hidden_gradient, weight_gradient, None, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with ``total`` in float32 and the factors in their own dtype."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # PyTorch has the mixed product for CUDA only
        total.addmm_(left.float(), right.float())


def _statistics(logits: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """float32 [3, rows]: maximum, sum of exponentials, label's logit, over the columns of this rank."""
    statistics = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    kernels.row_statistics[(len(logits),)](
        logits, labels, statistics, logits.shape[1], _known(logits, settings), settings.vocabulary_start,
        BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
    )  # fmt: skip
    return statistics


def _joined(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, label's logit) over the columns of all ranks of ``group``; the same bits on each."""
    everywhere = statistics[None]
    if group is not None and group.size() > 1:
        everywhere = statistics.new_empty(group.size(), *statistics.shape)
        dist.all_gather_into_tensor(everywhere.flatten(0, 1), statistics, group=group)
    maximum, total, target = everywhere.unbind(1)
    highest = maximum.amax(0)
    return highest + torch.log((total * torch.exp(maximum - highest)).sum(0)), target.sum(0)


def _to_gradient(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, token_weights: Tensor, settings: Settings
) -> Tensor:
    """The gradient with respect to the logits, in their place."""
    grid = (len(logits), triton.cdiv(logits.shape[1], kernels.BLOCK))
    kernels.logit_gradient[grid](
        logits, labels, log_sum_exp, token_weights, logits.shape[1], _known(logits, settings),
        settings.vocabulary_start, BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
    )  # fmt: skip
    return logits


def _known(logits: Tensor, settings: Settings) -> int:
    """How many of this rank's columns are vocabulary and not padding."""
    return max(0, min(logits.shape[1], settings.vocabulary_size - settings.vocabulary_start))


def _start_reduction(part: Tensor, settings: Settings) -> dist.Work | None:
    group = settings.process_group
    if group is None or group.size() == 1 or not settings.reduce_hidden_gradient:
        return None
    return dist.all_reduce(part, group=group, async_op=True)


def _check_labels(labels: Tensor, rows: Tensor, settings: Settings) -> None:
    known = labels.index_select(0, rows)
    wrong = torch.nonzero((known < 0) | (known >= settings.vocabulary_size)).flatten()
    if len(wrong):
        raise ValueError(
            f"label {int(known[wrong[0]])} in row {int(rows[wrong[0]])} is outside the vocabulary 0 to "
            f"{settings.vocabulary_size - 1} and not {settings.ignore_label} ({len(wrong)} such rows)"
        )


def check_arguments(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, settings: Settings) -> None:
    """ValueError on shapes, dtypes and sizes that do not fit."""
    require_device("linear_cross_entropy", hidden, weight, labels, token_weights)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [L, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must both be bfloat16 or float32, got {hidden.dtype} and {weight.dtype} "
            "(float16 is left out: its loss scale is known in the backward pass only, and gradients are made earlier)"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(hidden)}], got {labels.dtype} {list(labels.shape)}")
    if token_weights.shape != labels.shape or token_weights.dtype != torch.float32:
        raise ValueError(
            f"token_weights must be float32 [{len(hidden)}], got {token_weights.dtype} {list(token_weights.shape)}"
        )
    if settings.rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk must be at least 1, got {settings.rows_per_chunk}")
    if settings.vocabulary_start < 0 or settings.vocabulary_size < 1:
        raise ValueError(
            f"the vocabulary starts at {settings.vocabulary_start} here and has {settings.vocabulary_size} entries"
        )
