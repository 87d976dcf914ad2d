"""Linear cross entropy in plain PyTorch: all logits at once, the whole vocabulary on one rank, any floating dtype."""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    vocabulary_size: int | None = None,
    ignore_label: int = -100,
) -> tuple[Tensor, Tensor]:
    """(sum of token_weights * token losses, token losses [L], 0 where ignored); arguments as for the kernel.

    hidden [L, H], weight [V, H] of which rows from ``vocabulary_size`` on are padding.
    """
    logits = hidden @ weight[:vocabulary_size].T
    token_losses = F.cross_entropy(logits, labels, ignore_index=ignore_label, reduction="none")
    loss = token_losses.sum() if token_weights is None else (token_losses * token_weights).sum()
    return loss, token_losses.detach()
