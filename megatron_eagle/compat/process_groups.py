"""Process groups that Megatron should keep but has no public way to be handed.

Leaned on, names of ``megatron.core.parallel_state``:

- ``_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS``: the levels of context parallelism, which ``ProcessGroupCollection`` gives
  to the layers as ``hcp``. The public way, ``hierarchical_context_parallel_sizes`` of ``initialize_model_parallel``,
  makes the same groups but needs einops.
- ``_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO`` and ``_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO``: groups
  over gloo that the optimizer asks for when it is built, for checkpoints. A dry run has no gloo and writes none; the
  public way makes them with a real backend only.
"""

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state


def keep_context_levels(levels: Sequence[dist.ProcessGroup | None]) -> None:
    """Let Megatron hold this process's groups of each level of context parallelism, the inner one first."""
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = list(levels)


def stand_in_for_gloo() -> None:
    """Give the optimizer the data-parallel group itself where it asks for the same processes over gloo."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = group
    parallel_state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO = group
