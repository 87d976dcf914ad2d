"""Eagle's square-root average, normalised so that no layout, packing or accumulation changes the objective.

    loss = sum_i sqrt(n_i) mean_i / sum_i sqrt(n_i)

over the samples i with n_i labelled tokens each (NVlabs/Eagle, ``pre_calc_loss_weight``). A PackedBatch carries the
weights 1/sqrt(n_i) per token; what is left is the denominator. It is known before the forward pass, so it goes into the
weights: the loss of a step is then a plain sum over its tokens, wherever they are computed, and gradients are summed,
never averaged. docs/loss.md has the algebra and an example.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist

from megatron_eagle.data.sample.packed_batch import PackedBatch


def normalise_weights(
    batches: Sequence[PackedBatch],
    normaliser: Literal["global", "pack"],
    *,
    packs_in_step: int,
    data_parallel_group: dist.ProcessGroup | None,
) -> list[PackedBatch]:
    """Divide the loss weights of this replica's packs so that the step's loss is the sum over all its tokens.

    ``global`` divides by sum_i sqrt(n_i) over the packs of all replicas (``data_parallel_group``). ``pack`` divides
    each pack by its own sum and by ``packs_in_step``, i.e. the mean over packs that the released code computes. Packs
    without any label contribute nothing.
    """
    own = torch.stack([batch.loss_weights.double().sum() for batch in batches])
    if normaliser == "pack":
        divisors = own * packs_in_step
    else:
        total = own.sum()
        if data_parallel_group is not None and data_parallel_group.size() > 1:
            dist.all_reduce(total, group=data_parallel_group)
        divisors = total.expand(len(batches))
    divisors = torch.where(divisors > 0, divisors, torch.ones_like(divisors))
    return [
        replace(batch, loss_weights=(batch.loss_weights.double() / divisor).float())
        for batch, divisor in zip(batches, divisors, strict=True)
    ]
