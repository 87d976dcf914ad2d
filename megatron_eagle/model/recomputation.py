"""Gradients through layers that are computed again in the backward pass, where nothing in front of them trains."""

from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn


def pass_gradients(model: nn.Module) -> None:
    """Let the inputs of ``model``'s transformers need a gradient where whole layers are recomputed.

    Megatron's recomputation runs no backward pass in a layer whose input needs no gradient: behind a frozen embedding
    its weights or adapters would never learn.
    """
    for module in model.modules():
        if isinstance(module, TransformerBlock) and module.config.recompute_granularity == "full":
            module.register_forward_pre_hook(_need_gradient, with_kwargs=True)


class _NeedGradient(torch.autograd.Function):
    """Passes ``x`` on as something that has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _need_gradient(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def treat(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point() and torch.is_grad_enabled()) or x.requires_grad:
            return x
        return _NeedGradient.apply(x, torch.zeros((), device=x.device, requires_grad=True))

    if args:
        return (treat(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": treat(kwargs["hidden_states"])}
