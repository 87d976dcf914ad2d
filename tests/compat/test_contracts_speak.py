"""When a library takes away a name that ``compat`` leans on, the contract fails in its own words, and in no others."""

import importlib
import inspect

import pytest
from contracts import the
from private_names import Source, findings, own_names
from project import ROOT

from megatron_eagle.compat.cpu import REPLACED
from megatron_eagle.compat.platform import install

SAVING = "megatron.core.dist_checkpointing.strategies"
STATE = "megatron.core.parallel_state"
COMPAT = ROOT / "megatron_eagle" / "compat"
LIGER = {
    "rms_norm": "LigerRMSNormFunction",
    "swiglu": "LigerFusedGateUpSiLUMulFunction",
    "rope": "LigerRopeFunction",
}
# The name that is taken away, the contract that guards it, and what the message says among the rest.
GUARDED = [
    ("torch.distributed.checkpoint.filesystem:_StorageInfo", "checkpoint_index:where_a_tensor_lies", "index"),
    (
        f"{SAVING}.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
        "checkpoint_saving:where_writer_and_plan_pass_by",
        "hands writer and plan",
    ),
    (f"{SAVING}.filesystem_async:_results_queue", "checkpoint_saving:no_server_process_for_results", "server process"),
    ("megatron.energon:PackingDataset._fill_reading_buffer", "energon:the_progress_bar", "progress bar"),
    (
        "torch.testing._internal.distributed.fake_pg:_create_fake_pg",
        "fake_processes:a_process_group_with_nobody_in_it",
        "fake process group",
    ),
    (
        "torch.testing._internal.distributed.fake_pg:FakeStore",
        "fake_processes:a_process_group_with_nobody_in_it",
        "fake process group",
    ),
    ("megatron.core.models.gpt:GPTModel._preprocess", "gpt_model:hooks_before_and_behind_the_layers", "_preprocess"),
    ("megatron.core.models.gpt:GPTModel._postprocess", "gpt_model:hooks_before_and_behind_the_layers", "_postprocess"),
    (
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer",
        "gradient_buffers:memory_of_gradients_and_weights",
        "grad_data",
    ),
    (
        f"{STATE}:_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS",
        "process_groups:levels_of_context_parallelism",
        "_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS",
    ),
    *(
        (f"{STATE}:_INTRA_PARTIAL_{name}_GLOO", "process_groups:groups_over_gloo", "gloo groups of its optimizer")
        for name in ("DATA_PARALLEL_GROUP_WITH_CP", "EXPERT_DATA_PARALLEL_GROUP")
    ),
    ("torch._C:ScriptObject._type", "torch_dispatch:group_of_a_collective", "a boxed ProcessGroup"),
    ("torch.utils._python_dispatch:TorchDispatchMode", "torch_dispatch:every_operation_is_seen", "TorchDispatchMode"),
    ("torch.utils._pytree:tree_leaves", "torch_dispatch:trees_of_tensors", "tree_leaves"),
    ("torch.utils._pytree:tree_map_only", "torch_dispatch:trees_of_tensors", "tree_map_only"),
    ("megatron.core.transformer.mlp:MLP", "mlp_submodule:a_layer_takes_the_mlp_as_it_is_named", "MLP"),
    ("megatron.core.optimizer:Adam", "adam:megatrons_optimizer_takes_this_adam", "apex.optimizers.FusedAdam takes"),
    (
        "megatron.energon.savable_loader:SavableDataLoaderState",
        "energon_state:the_state_of_a_loader",
        "another class than compat/energon_state.py knows",
    ),
    ("liger_kernel.ops.rms_norm:rsqrt", "liger:rsqrt", "replaces it in the interpreter"),
    *(
        (f"multistorageclient{name}", "multi_storage_client:forgetting_what_the_cache_holds", "forget an answer")
        for name in (
            ":StorageClient._cache_manager",
            ".cache:CacheManager._invalidate_chunks",
            ".cache:CacheManager._get_cache_file_path",
        )
    ),
    *(
        (f"liger_kernel.ops.{module}:{function}", "liger:arguments", f"Liger-Kernel's {function} no longer takes")
        for module, function in LIGER.items()
    ),
]
# What takes the place of others' names is in REPLACED, and these touch none: they ask for a version and a device.
NOT_GUARDED = {"cpu", "platform", "versions"}


def test_every_file_of_compat_has_a_name_that_is_taken_away():
    guarding = {contract.partition(":")[0] for _, contract, _ in GUARDED}
    assert guarding | NOT_GUARDED == {file.stem for file in COMPAT.glob("[!_]*.py")}
    assert not guarding & NOT_GUARDED


def test_every_private_name_of_compat_is_taken_away():
    sources = [Source.of(file, file.read_text(encoding="utf-8"), {"megatron_eagle"}) for file in COMPAT.glob("*.py")]
    touched = {what for source in sources for _, what in findings(source, own_names(sources), sources)}
    taken = {name.replace(":", ".").rpartition(".")[2] for name, _, _ in GUARDED} | {"_cdata"}
    assert {what for what in touched if what.rpartition(".")[2] not in taken} == set()
    assert len(touched) > 10


@pytest.mark.parametrize(("name", "contract", "words"), GUARDED, ids=[name for name, _, _ in GUARDED])
def test_a_name_that_is_gone_is_said_in_the_contracts_words(monkeypatch, caplog, tmp_path, name, contract, words):
    install()
    file, _, test = contract.partition(":")
    check = getattr(importlib.import_module(f"test_{file}"), f"test_contract_{test}")
    module, _, names = name.partition(":")
    above, _, last = names.rpartition(".")
    monkeypatch.delattr(the(f"{module}:{above}") if above else importlib.import_module(module), last)
    given = {"caplog": caplog, "tmp_path": tmp_path, "module": module.rpartition(".")[2], "function": last}
    asked_for = inspect.signature(check).parameters
    with pytest.raises(pytest.fail.Exception, match=words) as failed:
        check(**{one: given[one] for one in asked_for})
    assert last in str(failed.value)


def test_an_address_that_is_gone_is_said(monkeypatch):
    """Of a class that nothing can be taken from: the class itself is another one."""
    from test_torch_dispatch import test_contract_address_of_a_storage as check

    monkeypatch.setattr("torch.UntypedStorage", type("UntypedStorage", (), {}))
    with pytest.raises(pytest.fail.Exception, match=r"have their address in _cdata.*no attribute '_cdata'"):
        check()


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in REPLACED.items() for name in names])
def test_a_name_that_is_replaced_and_gone_is_said(monkeypatch, module, name):
    from test_cpu import test_contract_names_that_are_replaced as check

    install()
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(pytest.fail.Exception, match=rf"{module} no longer has {name}: compat/cpu\.py puts"):
        check(module=module, name=name)
