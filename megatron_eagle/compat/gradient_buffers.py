"""The flat buffers in which Megatron's DistributedDataParallel keeps gradients and, for its optimizer, weights.

Leaned on: ``buffers`` and ``ddp_config`` of ``DistributedDataParallel``, and of each buffer ``grad_data``,
``param_data``, ``numel``, ``numel_unpadded``, ``data_parallel_group`` and ``buckets``. The distributed optimizer gives
each process of that group one of as many equal shares of a bucket, in order. The names have no underscore, but their
class does (``_ParamAndGradBuffer``), and nothing public says how many bytes they hold, gathers shares of gradients, or
corrects what ``count_padding_as_content`` corrects. Also the hooks by which it listens for gradients
(``_make_backward_post_hook``), which there is no public way to remove.
"""

import gc
from types import FunctionType

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

_HOOK = "DistributedDataParallel._make_backward_post_hook.<locals>.hook"


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


def gather_shares(chunk: DistributedDataParallel) -> None:
    """Give every process the shares of each bucket that the distributed optimizer leaves to the others."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return  # every process has all of it
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def let_go_of_gradients() -> None:
    """Make every wrapped model of this process collectable; none of them can be trained afterwards.

    A wrapped model's hooks hang on the autograd nodes of its weights and hold the model, and the nodes stay: a cycle
    through C++ that Python's collector does not see. Models would stay in memory, and with them their process groups,
    whose threads wake up a hundred times a second.
    """
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__qualname__ == _HOOK:  # isinstance asks things that warn
            for cell in thing.__closure__ or ():
                cell.cell_contents = None
