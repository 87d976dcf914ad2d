"""compat/process_groups.py."""

import torch.distributed as dist
from contracts import contract, megatron_groups, the
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eagle.compat import process_groups

STATE = "megatron.core.parallel_state"


@contract(
    f"megatron-core no longer keeps its hierarchical context-parallel groups in {STATE}."
    "_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS: parallel/groups.py has them put there, so that layers get them as hcp"
)
def test_contract_levels_of_context_parallelism():
    with megatron_groups(2, context_parallel_size=2):
        the(f"{STATE}:_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS")
        levels = [dist.new_group([0]), dist.new_group([0, 1])]
        process_groups.keep_context_levels(levels)
        assert ProcessGroupCollection.use_mpu_process_groups(["hcp"]).hcp == levels


@contract(
    f"megatron-core no longer keeps the gloo groups of its optimizer in {STATE}._INTRA_PARTIAL_...: a dry run, "
    "which has no gloo, has its data-parallel group put there"
)
def test_contract_groups_over_gloo():
    the(f"{STATE}:_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO")
    the(f"{STATE}:_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO")
    with megatron_groups(2):
        process_groups.stand_in_for_gloo()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        of_optimizer = parallel_state.get_data_parallel_group_gloo(
            with_context_parallel=True, partial_data_parallel=True
        )
        of_experts = parallel_state.get_expert_data_parallel_group_gloo(partial_expert_data_parallel=True)
        assert of_optimizer is of_experts is group
