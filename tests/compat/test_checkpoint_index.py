"""compat/checkpoint_index.py."""

import dataclasses

from contracts import contract, the


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
