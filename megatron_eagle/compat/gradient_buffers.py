"""The flat buffers in which Megatron's DistributedDataParallel keeps gradients and, for its optimizer, weights.

Leaned on: ``buffers`` of ``DistributedDataParallel``, and of each ``grad_data``, ``param_data``, ``numel``,
``numel_unpadded`` and ``buckets``. The names have no underscore, but their class does (``_ParamAndGradBuffer``), and
nothing public says how many bytes they hold or corrects what ``count_padding_as_content`` corrects.
"""

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor


def gradient_tensors(chunk: DistributedDataParallel) -> list[Tensor]:
    """All memory of gradients."""
    return [buffer.grad_data for buffer in chunk.buffers]


def weight_tensors(chunk: DistributedDataParallel) -> list[Tensor]:
    """All memory of weights that lie in buffers, which is so with the distributed optimizer."""
    return [buffer.param_data for buffer in chunk.buffers if buffer.param_data is not None]


def count_padding_as_content(chunk: DistributedDataParallel) -> None:
    """Make the distributed optimizer save what belongs to each parameter.

    megatron-core 0.16.1 joins the buckets of a gradient buffer without the padding at their ends and then cuts out each
    parameter at its place *with* padding: after the first bucket whose length is no multiple of 128, every parameter is
    saved with its neighbour's optimizer state, and the last elements with zeros (a warning calls it issue 504). Buckets
    that count their padding as content have both in the same place.
    """
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel
