"""What code outside compat leans on without a private name: attributes and orders that Megatron nowhere promises."""

import torch
from contracts import contract, megatron_groups, without_gpu
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

pytestmark = without_gpu
ALONE = ModelParallelConfig(use_cpu_initialization=True)


def marks(weight: torch.Tensor) -> tuple[bool, int, int]:
    return weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride  # type: ignore[attr-defined]


@contract(
    "Megatron's parallel layers no longer mark their weights with tensor_model_parallel, partition_dim and "
    "partition_stride: model/weights.py reads from these which slice of a whole weight a process holds"
)
def test_contract_marks_of_split_weights():
    zeros = {"config": ALONE, "init_method": torch.nn.init.zeros_}
    with megatron_groups(2, tensor_model_parallel_size=2):
        column = ColumnParallelLinear(4, 8, stride=2, **zeros)
        row = RowParallelLinear(8, 4, bias=True, input_is_parallel=True, skip_bias_add=False, **zeros)
        embedding = VocabParallelEmbedding(8, 4, **zeros)
        assert marks(column.weight) == (True, 0, 2) and column.weight.shape == (4, 4)
        assert marks(row.weight) == (True, 1, 1) and row.weight.shape == (4, 4)
        assert marks(embedding.weight) == (True, 0, 1) and embedding.weight.shape == (4, 4)
        assert column.bias.tensor_model_parallel and not getattr(row.bias, "tensor_model_parallel", False)


@contract(
    "Megatron no longer marks the last stage's copy of a tied embedding as shared: model/weights.py draws and "
    "loads it as the embedding by that"
)
def test_contract_mark_of_a_tied_embedding():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    with megatron_groups(2, rank=1, pipeline_model_parallel_size=2):
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=2,
            pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
            use_cpu_initialization=True,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=16,
            max_sequence_length=4,
            pre_process=False,
            share_embeddings_and_output_weights=True,
        )
        assert getattr(model.output_layer.weight, "shared", False)


@contract(
    "Megatron no longer numbers tensor-parallel ranks fastest, then context, data and pipeline: dry_run/walk.py "
    "and parallel/groups.py place processes so"
)
def test_contract_order_of_ranks():
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2}
    with megatron_groups(16, rank=11, **sizes):
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        assert place == (1, 1, 0, 1)


@contract(
    "Megatron's group of processes that share experts is no longer each process by itself where there are none: "
    "parallel/groups.py takes it for the group of this process alone"
)
def test_contract_no_experts():
    with megatron_groups(4, rank=2, tensor_model_parallel_size=2):
        group = parallel_state.get_expert_model_parallel_group()
        assert torch.distributed.get_process_group_ranks(group) == [2]
