"""compat/adam.py: torch's steps, by FusedAdam's contract."""

import subprocess
import sys

import pytest
import torch
from contracts import contract, megatron_groups, without_gpu

from megatron_eagle.compat.adam import FusedAdam


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_adam_makes_torchs_steps_and_counts_them_in_the_group(decoupled):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(5.0)) for _ in range(2))
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        [theirs], lr=0.1, weight_decay=0.3, betas=(0.8, 0.9)
    )
    adam = FusedAdam([ours], lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), adam_w_mode=decoupled)
    for _ in range(4):
        ours.grad = torch.randn(5, generator=generator)
        theirs.grad = ours.grad.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
    assert adam.param_groups[0]["step"] == 4
    assert set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"}


WHOLE_LIFE = """
import sys, torch
from megatron_eagle.compat.adam import FusedAdam
weight = torch.nn.Parameter(torch.ones(2))
adam = FusedAdam([weight])
weight.grad = torch.ones(2)
adam.step()
adam.zero_grad()
adam.load_state_dict(adam.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_nothing_of_torch_compile_is_imported_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", WHOLE_LIFE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@without_gpu
@contract(
    "Megatron's optimizers hand FusedAdam other arguments, or no longer take the class beside them: compat/adam.py "
    "is written by what apex.optimizers.FusedAdam takes"
)
def test_contract_megatrons_optimizer_takes_this_adam():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    with megatron_groups():
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        model = DistributedDataParallel(config, ddp, torch.nn.Linear(3, 5))
        settings = OptimizerConfig(lr=0.1, use_distributed_optimizer=True, params_dtype=torch.float32)
        (optimizer,) = get_megatron_optimizer(settings, [model]).chained_optimizers
        assert type(optimizer.optimizer) is FusedAdam
