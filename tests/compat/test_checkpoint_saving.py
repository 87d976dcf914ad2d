"""compat/checkpoint_saving.py."""

import inspect
import queue

import torch
from contracts import contract, megatron_groups, the
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_eagle.compat.versions import is_before_0_19

STRATEGIES = "megatron.core.dist_checkpointing.strategies"


@contract(
    "Megatron's TorchDistSaveShardedStrategy no longer hands writer and plan to _get_save_and_finalize_callbacks("
    "writer, plan): compat/checkpoint_saving.py takes them there, so that a thread can write"
)
def test_contract_where_writer_and_plan_pass_by():
    method = the(f"{STRATEGIES}.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks")
    later = [] if is_before_0_19() else ["async_strategy"]
    assert list(inspect.signature(method).parameters) == ["self", "writer", "save_state_dict_ret", *later]


@contract(
    "Megatron's writer no longer takes its queue of results from filesystem_async._results_queue: it would start a "
    "server process, one more Python for every process that saves"
)
def test_contract_no_server_process_for_results():
    the(f"{STRATEGIES}.filesystem_async:_results_queue")
    private = "_" if is_before_0_19() else ""
    taken = the(f"{STRATEGIES}.filesystem_async:{private}get_write_results_queue")
    from megatron_eagle.compat.checkpoint_saving import collect_results_here

    collect_results_here()
    assert isinstance(taken(), queue.Queue)


@contract(
    "Megatron's async_save no longer plans buckets (path, key, (texts, tensors)), or its write_preloaded_data no "
    "longer writes one: checkpoint/saver.py copies them and checkpoint/writer.py has them written"
)
def test_contract_planning_and_writing_a_file(tmp_path):
    from megatron_eagle.compat.checkpoint_saving import plan_save, write_bucket

    with megatron_groups():
        weight = torch.arange(6.0)
        state = {"weight": ShardedTensor.from_rank_offsets("weight", weight, replica_id=0), "step": 7}
        planned = plan_save(state, tmp_path, check=True)
        assert planned.common == {"step": 7}
        weight.zero_()  # training goes on
        ((path, _, (texts, tensors)),) = planned.buckets
        assert not texts and [tensor.tolist() for _, tensor in tensors] == [[0, 1, 2, 3, 4, 5]]
        results = write_bucket(planned.writer, 0, planned.buckets[0])
        planned.writer.finish(planned.index, [results])
        (place,) = FileSystemReader(tmp_path).read_metadata().storage_data.values()
        assert (tmp_path / place.relative_path).stat().st_size >= place.length > 24
        assert str(tmp_path / place.relative_path) == str(path)
