"""compat/cpu.py: Megatron-Core trains on a CPU under its redirections, and nothing outside of it changes."""

import subprocess
import sys
from collections import Counter
from datetime import timedelta

import pytest
import torch
from contracts import contract, the

from megatron_eagle.compat.cpu import FACTORIES, REPLACED
from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.parallel.groups import initialise

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the platform changes nothing")


def train_stock_gpt(precision):
    """Megatron's own GPTModel, wrappers and optimizer, 8 steps on one batch; (losses, what was redirected)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    platform = install(trace=True)
    platform.redirected.clear()
    initialise(Layout(tp=2), platform, timeout=timedelta(seconds=60))
    model_parallel_cuda_manual_seed(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
    if precision == "bf16":
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, model)
    settings = OptimizerConfig(
        lr=1e-2, bf16=config.bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(settings, [model])
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))

    def step(batches, chunk):
        output = chunk(next(batches), torch.arange(16).expand(2, 16), None, labels=tokens.roll(-1, 1))
        return output, lambda losses: (
            losses.sum(),
            torch.tensor(32, dtype=torch.int),
            {"loss": losses.detach().mean()},
        )

    losses = []
    for _ in range(8):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        (result,) = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([tokens]),
            model=model,
            num_microbatches=1,
            seq_length=16,
            micro_batch_size=2,
            forward_only=False,
        )
        optimizer.step()
        losses.append(float(result["loss"]))
    return losses, dict(platform.redirected), platform.report()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_megatrons_own_model_trains_and_the_trace_names_the_call_sites(worlds, precision):
    (losses, redirected, report), (other_losses, _, _) = worlds(2).run(train_stock_gpt, precision)
    assert losses[-1] < 0.7 * losses[0]
    assert losses == other_losses
    files = Counter[tuple[str, str]]()
    for (what, where), count in redirected.items():
        file, _, line = where.rpartition(":")
        assert line.isdigit() and file.endswith(".py") and not file.startswith("/")
        files[what, file] += count
    assert files["torch.zeros(device='cuda')", "pipeline_parallel/schedules.py"] == 8
    assert files["torch.cuda.current_device()", "tensor_parallel/layers.py"] > 0
    assert files["torch.cuda.manual_seed()", "tensor_parallel/random.py"] > 0
    assert files["Tensor.type()", "optimizer/distrib_optimizer.py"] > 0
    assert len(report.splitlines()) == len(redirected)


def test_torch_outside_megatron_is_untouched():
    install()
    import megatron.core.utils
    from megatron.core.tensor_parallel import random

    for name in FACTORIES:
        assert getattr(torch, name) is getattr(torch._C._VariableFunctions, name, getattr(torch, name))
        assert getattr(megatron.core.utils.torch, name) is not getattr(torch, name)
    assert megatron.core.utils.torch.Tensor is torch.Tensor
    assert random.torch.cuda.current_device() == torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).cuda()
    assert torch.zeros(2).type() == "torch.FloatTensor"
    assert torch.zeros(2).type(torch.int64).dtype == torch.int64


@pytest.mark.slow
def test_modules_imported_before_are_treated_too():
    """In a process of its own, because the order of imports is the point."""
    program = (
        "import megatron.core.tensor_parallel.random as r, torch; t = r.torch; assert t is torch\n"
        "from megatron_eagle.compat.platform import install; platform = install()\n"
        "assert r.torch is not torch and r.torch.zeros(3, device='cuda').device.type == 'cpu'\n"
        "r._set_cuda_rng_state(r._get_cuda_rng_state())\n"
        "assert platform.backend == 'gloo' and not platform.redirected\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=200)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in REPLACED.items() for name in names])
@contract("{module} no longer has {name}: compat/cpu.py puts our own there, so that Megatron needs no CUDA")
def test_contract_names_that_are_replaced(module, name):
    install()
    assert the(f"{module}:{name}") is REPLACED[module][name]
