"""compat/gradient_buffers.py."""

import gc
import weakref

import torch
from contracts import contract, megatron_groups, the, without_gpu

from megatron_eagle.compat.gradient_buffers import (
    count_padding_as_content,
    gather_shares,
    gradient_tensors,
    let_go_of_gradients,
    weight_tensors,
)

pytestmark = without_gpu


def wrapped(*, distributed: bool):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=True, bucket_size=3)
    return DistributedDataParallel(config, ddp, torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)))


@contract(
    "Megatron's DistributedDataParallel no longer keeps gradients in buffers' grad_data, or weights in param_data "
    "with the distributed optimizer: measuring/accounting.py counts their bytes"
)
def test_contract_memory_of_gradients_and_weights():
    the("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer")
    with megatron_groups():
        chunk, plain = wrapped(distributed=True), wrapped(distributed=False)
        parameters = list(chunk.parameters())
        assert sum(tensor.numel() for tensor in gradient_tensors(plain)) == sum(p.numel() for p in parameters)
        own = {tensor.untyped_storage().data_ptr() for tensor in weight_tensors(chunk)}
        assert {parameter.untyped_storage().data_ptr() for parameter in parameters} == own
        assert weight_tensors(plain) == []


@contract(
    "Megatron's gradient buckets no longer say in numel_unpadded how much of them is no padding: "
    "training/optimizer.py has it count as content, or the distributed optimizer would save others' states"
)
def test_contract_padding_of_buckets():
    with megatron_groups():
        chunk = wrapped(distributed=True)
        (buffer,) = chunk.buffers
        assert len(buffer.buckets) > 1 and all(b.numel_unpadded < b.grad_data.numel() for b in buffer.buckets)
        assert buffer.numel_unpadded == sum(b.numel_unpadded for b in buffer.buckets) < buffer.numel
        count_padding_as_content(chunk)
        assert buffer.numel_unpadded == sum(b.numel_unpadded for b in buffer.buckets) == buffer.numel


@contract(
    "Megatron's gradient buffers no longer name the processes that share a bucket, or the shares are not equal: "
    "training/ema.py puts a running mean together from them"
)
def test_contract_shares_of_buckets():
    with megatron_groups():
        for chunk in (wrapped(distributed=True), wrapped(distributed=False)):
            (gradients,) = gradient_tensors(chunk)
            gradients.copy_(torch.arange(len(gradients)))
            gather_shares(chunk)
            assert chunk.buffers[0].data_parallel_group.size() == 1
            assert torch.equal(gradients, torch.arange(len(gradients)).float())


@contract(
    "Megatron's DistributedDataParallel no longer listens for gradients by the hooks of _make_backward_post_hook, or "
    "something else keeps it alive: compat/gradient_buffers.py empties them, or worlds' processes fill up with threads"
)
def test_contract_a_wrapped_model_can_be_let_go_of():
    with megatron_groups():
        chunk = wrapped(distributed=True)
        gone = weakref.ref(chunk.module)
        let_go_of_gradients()
        del chunk
        gc.collect()
        assert gone() is None
