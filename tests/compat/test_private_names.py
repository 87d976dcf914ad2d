"""Private names of other libraries are touched in megatron_eagle/compat only, and each file there has its contract."""

import ast
from functools import lru_cache
from pathlib import Path

import pytest
from private_names import Source, findings, own_names

ROOT = Path(__file__).parents[2]
COMPAT = ROOT / "megatron_eagle" / "compat"
# eagle_kernels imports torch and triton only, so it cannot use compat: this file is its own compat, with a contract in
# tests/kernels/test_triton_contract.py.
# Exported code imports nothing of this project either; tests/conversion/test_remote_code.py runs it.
OUTSIDE = {
    "kernels/eagle_kernels/checking/interpreter.py",
    "megatron_eagle/remote_code/modeling_eagle.py",
    # What vLLM documents for models from outside is methods with a leading underscore, of classes that are absent where
    # compat is; tests/vllm_plugin runs them in vLLM.
    "megatron_eagle/serving/vllm/config.py",
    "megatron_eagle/serving/vllm/model.py",
    "megatron_eagle/serving/vllm/processing.py",
}
CODE = ("megatron_eagle", "kernels", "benchmarks", "tools", "examples")

# What tests lean on beside their subjects. A name that is used no more leaves the list.
IN_TESTS: dict[str, set[str]] = {
    # All options there are, with their types.
    "tests/cases/test_case_options.py": {"p._actions", "parser._actions"},
    # Whether torch's factories are the very same functions as before.
    "tests/compat/test_cpu.py": {"torch._C", "torch._C._VariableFunctions"},
    # The order of a collective's arguments.
    "tests/compat/test_torch_dispatch.py": {"getattr(torch.ops.c10d, operation).default._schema"},
    # How long a reader process that ended is waited for: five seconds at each teardown otherwise.
    "tests/data/test_stream.py": {"torch.utils.data._utils"},
    # Where the backward pass begins, which runs in C++.
    "tests/fake_device.py": {"torch.autograd._engine_run_backward"},
    # Kernels of Liger-Kernel: which operation one calls, and what it is built to.
    "tests/compat/test_liger.py": {"liger_kernel.ops.rms_norm._rms_norm_forward_kernel"},
    "tests/kernels/test_liger_parity.py": {
        "liger_kernel.ops.rms_norm._rms_norm_forward_kernel",
        "liger_kernel.ops.rms_norm._rms_norm_backward_kernel",
        "liger_kernel.ops.swiglu._swiglu_fused_gate_up_forward_kernel",
        "liger_kernel.ops.swiglu._swiglu_fused_gate_up_backward_kernel",
        "liger_kernel.ops.rope._triton_rope",
    },
    # The kernels' tests run without the trainer, so without compat.
    "tests/kernels/test_linear_cross_entropy.py": {
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.utils._pytree.tree_leaves",
    },
    # What attention each part of a loaded model runs with.
    "tests/outside_code.py": {"m.config._attn_implementation"},
    # Operators whose work is counted.
    "tests/planning/test_flops.py": {
        "ATEN._scaled_dot_product_flash_attention_for_cpu",
        "ATEN._scaled_dot_product_flash_attention_for_cpu_backward",
    },
}


@lru_cache
def read(folder: str) -> list[Source]:
    own = {"megatron_eagle", "eagle_kernels", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    files = sorted((ROOT / folder).rglob("*.py"))
    return [Source.of(file, file.read_text(encoding="utf-8"), own) for file in files]


def found_in(sources: list[Source]) -> dict[str, set[str]]:
    own = own_names(source for source in sources if COMPAT not in source.path.parents)
    found: dict[str, set[str]] = {}
    for source in sources:
        name = source.path.relative_to(ROOT).as_posix()
        if COMPAT not in source.path.parents and name not in OUTSIDE:
            found[name] = {what for _, what in findings(source, own, sources)}
    return {name: names for name, names in found.items() if names}


def test_only_compat_touches_private_names_of_other_libraries() -> None:
    assert found_in([source for folder in CODE for source in read(folder)]) == {}


def test_what_tests_lean_on_is_listed() -> None:
    found = found_in([source for folder in (*CODE, "tests") for source in read(folder)])
    assert {name: names for name, names in found.items() if name.startswith("tests/")} == IN_TESTS


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from torch import _dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_leaves", "torch.utils._pytree.tree_leaves"),
        ("import torch._inductor.config", "torch._inductor.config"),
        (
            "def f():\n    from megatron.core.optimizer import _get_param_groups",
            "megatron.core.optimizer._get_param_groups",
        ),
        ("from megatron.core import parallel_state as p\np._MPU = 1", "megatron.core.parallel_state._MPU"),
        ("import torch as t\nx = t.nn._reduction", "torch.nn._reduction"),
        ("import torch\nx = torch.empty(1).untyped_storage()._cdata", "torch.empty(1).untyped_storage()._cdata"),
        ("def f(tensor):\n    tensor._version = 1", "tensor._version"),
        ("import torch\nsetattr(torch.nn, '_x', 1)", "torch.nn._x"),
        ("def f(x):\n    return getattr(x, '_cdata')", "x._cdata"),
        ("import argparse\nVerbs = 'argparse._SubParsersAction[int]'", "argparse._SubParsersAction"),
        ("from torch import nn\nclass A(nn.Module):\n    def _call_impl(self): ...", "torch.nn.Module._call_impl"),
        (
            "from torch import nn\nclass A(nn.Module): ...\nclass B(A):\n    x = lambda self: self._buffers",
            "torch.nn.Module._buffers",
        ),
        (
            "from megatron.core.models.gpt import GPTModel as G\nclass A(G):\n    def f(self): super()._preprocess()",
            "megatron.core.models.gpt.GPTModel._preprocess",
        ),
        (
            "from megatron.energon import PackingDataset as P\nclass A(P[int]):\n    def f(self): self._reading_buffer",
            "megatron.energon.PackingDataset._reading_buffer",
        ),
    ],
)
def test_each_way_of_touching_one_is_found(text: str, name: str) -> None:
    source = Source.of(ROOT / "made_up.py", text, {"megatron_eagle"})
    assert name in {what for _, what in findings(source, own_names([source]), [source])}


@pytest.mark.parametrize(
    "text",
    [
        "from megatron_eagle.model.attention import _mask\n_mask(1)",
        "import os, sys\nos._exit(sys._getframe(1).f_lineno)",
        "from torch import nn\nclass A(nn.Module):\n    def _own(self): self._kept = self._own()",
        "class A:\n    def _preprocess(self): ...\nA()._preprocess()",
        "from __future__ import annotations\nimport torch\nx = torch.__version__",
        "for _ in range(3): pass",
    ],
)
def test_names_of_our_own_are_not(text: str) -> None:
    source = Source.of(ROOT / "made_up.py", text, {"megatron_eagle"})
    assert list(findings(source, own_names([source]), [source])) == []


@pytest.mark.parametrize("file", sorted(COMPAT.glob("[!_]*.py")), ids=lambda file: file.stem)
def test_each_file_of_compat_says_why_and_has_a_contract(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert (ROOT / "tests" / "compat" / f"test_{file.name}").exists()
