"""Vocabulary projection and cross entropy in one, without ever holding the logits of a whole pack.

The logits of 32 768 tokens over Qwen2.5's 152 064 entries are 10 GB in bfloat16, and eager PyTorch keeps several
float32 copies of them. Here rows go through in chunks: logits, softmax and gradient share one buffer, and what remains
are the gradients of hidden states and weight (how and why: ``op``).

- Per-token weights go into loss and gradient: Eagle's square-root average is a plain weighted sum.
- Ignored rows are never computed. In a vision-language pack most tokens are image or question; only labelled rows are
  multiplied. Their number is needed on the host, so the call waits for the GPU once (an error in a label is then
  reported in words, too).
- The vocabulary may be split over tensor-parallel ranks, with padded entries at its end.
- What does not require a gradient costs nothing: no dW for a frozen head, one matrix product for evaluation.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_kernels.linear_cross_entropy.op import LinearCrossEntropyFunction, Settings, check_arguments

__all__ = ["Losses", "linear_cross_entropy"]


class Losses(NamedTuple):
    """``loss``: float32 scalar, sum of weight * loss over tokens. ``tokens``: float32 [L], their losses, detached."""

    loss: Tensor
    tokens: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    vocabulary_size: int | None = None,
    vocabulary_start: int = 0,
    process_group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    ignore_label: int = -100,
    rows_per_chunk: int = 4096,
) -> Losses:
    """sum_t token_weights[t] * cross_entropy(hidden[t] @ weight^T, labels[t]) over the rows that are not ignored.

    hidden: [L, H], bfloat16 or float32. weight: [V, H] of the same dtype, this rank's part of the vocabulary. Logits
        are rounded to that dtype, as a linear layer would; sums over them and dW are float32.
    labels: int64 [L], entries of the whole vocabulary or ``ignore_label``. token_weights: float32 [L], default 1.
    vocabulary_size: true size of the whole vocabulary; entries from there on are padding. Default: as long as
        ``weight``.
    vocabulary_start: the entry that weight[0] stands for.
    process_group: the ranks among which the vocabulary is split; hidden, labels and weights must be the same on all of
        them, and ``vocabulary_size`` must be given. Loss and token losses are those of the whole vocabulary, on every
        rank.
    reduce_hidden_gradient: sum hidden's gradient over the group. False leaves this rank's share, for a caller that
        reduce-scatters it (sequence parallelism).
    rows_per_chunk: rows whose logits exist at a time; 4096 rows make the matrix products efficient and take 1.2 GB at
        V = 152 064 in bfloat16.

    The loss can be differentiated once, in any number of backward passes. Raises ValueError where arguments do not fit
    or a label is outside the vocabulary, RuntimeError on a CPU tensor unless Triton interprets its kernels.
    """
    if vocabulary_size is None:
        if process_group is not None or vocabulary_start:
            raise ValueError("a part of the vocabulary needs vocabulary_size, the true size of the whole")
        vocabulary_size = len(weight)
    if token_weights is None:
        token_weights = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    settings = Settings(
        vocabulary_start, vocabulary_size, process_group, reduce_hidden_gradient, ignore_label, rows_per_chunk
    )
    check_arguments(hidden, weight, labels, token_weights, settings)
    return Losses(*LinearCrossEntropyFunction.apply(hidden, weight, labels, token_weights, settings))
