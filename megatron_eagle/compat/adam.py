"""The Adam of a machine without a GPU, by the contract of apex's and Transformer Engine's FusedAdam.

Leaned on: how Megatron's optimizers call FusedAdam, and that ``DistributedOptimizer`` writes and reads one step count
for a parameter group (``assert len(steps) == 1`` in distrib_optimizer.py). No public way: torch's own Adam, Megatron's
fallback, counts steps for each parameter, and such checkpoints cannot be loaded. ``cpu.py`` puts this class where
Megatron looks for FusedAdam.
"""

import inspect
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """Adam that keeps its step count in the parameter group, as apex's and Transformer Engine's FusedAdam do.

    Megatron's DistributedOptimizer writes and reads checkpoints by that contract; with torch's Adam (a step per
    parameter) they cannot be loaded. Arguments are those of ``apex.optimizers.FusedAdam`` that Megatron passes.
    """

    # torch keeps these out of what ``torch.compile`` compiles, and imports that when they are called: 0.5 to 0.7 s.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("this Adam counts its steps on the host, capturable=True (a CUDA graph) is not supported")
        if not bias_correction:
            raise ValueError(
                "this Adam always corrects the bias of its moments, bias_correction=False is not supported"
            )
        self._update = adamw if adam_w_mode else adam
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            group["step"] = int(group.get("step") or 0) + 1
            for parameter in parameters:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            self._update(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in parameters],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
