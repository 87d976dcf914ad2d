"""compat/checkpoint_index.py."""

import dataclasses

import torch
from contracts import contract, megatron_groups, the, without_gpu


@contract(
    "PyTorch's index of a checkpoint no longer says by _StorageInfo's relative_path, offset and length where a "
    "tensor lies: conversion/ reads and writes checkpoints by them"
)
def test_contract_where_a_tensor_lies():
    info = the("torch.distributed.checkpoint.filesystem:_StorageInfo")
    fields = [field.name for field in dataclasses.fields(info)]
    assert fields[:3] == ["relative_path", "offset", "length"]


@contract(
    "PyTorch lost a class or function that the index of a checkpoint may name: checkpoint/safe_index.py loads them"
)
def test_contract_classes_of_an_index():
    from megatron_eagle.compat.checkpoint_index import INDEX_CLASSES

    for module, names in INDEX_CLASSES.items():
        for name in names:
            the(f"{module}:{name}")


@without_gpu
@contract(
    "Megatron's parallel linear layers no longer put an empty extra state beside their weight, or under another "
    "key: conversion/torch_dist_writer.py writes one, because loading asks for it"
)
def test_contract_extra_state_of_a_linear_layer():
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_eagle.compat.checkpoint_index import extra_state_key

    with megatron_groups():
        linear = ColumnParallelLinear(
            4, 4, config=ModelParallelConfig(use_cpu_initialization=True), init_method=torch.nn.init.zeros_
        )
        state = linear.sharded_state_dict("mlp.linear_fc1.", ((0, 2, 5),), {"dp_cp_group": linear.tp_group})
        key = state["mlp.linear_fc1._extra_state"].unique_key
        assert key == extra_state_key("mlp.linear_fc1.weight", 2, 5)
        assert linear.get_extra_state() is None
