"""compat/adam.py: torch's steps, by FusedAdam's contract."""

import pytest
import torch

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
