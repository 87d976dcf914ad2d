"""compat/mlp_submodule.py."""

import logging

import torch
from contracts import contract, megatron_groups, without_gpu

from megatron_eagle.compat.mlp_submodule import mlp_submodule


@without_gpu
@contract("Megatron's TransformerLayer no longer builds its MLP of what compat/mlp_submodule.py names")
def test_contract_a_layer_takes_the_mlp_as_it_is_named(caplog):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    caplog.set_level(logging.WARNING)
    with megatron_groups():
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)
        spec = TransformerLayerSubmodules(mlp=mlp_submodule(ColumnParallelLinear, RowParallelLinear))
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp"])
        layer = TransformerLayer(config, spec, pg_collection=groups)
        assert type(layer.mlp) is MLP
        output, _ = layer.mlp(torch.zeros(3, 1, 8))
        assert output.shape == (3, 1, 8)
    assert "mlp" not in caplog.text.lower()
