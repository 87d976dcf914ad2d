"""linear_cross_entropy on a GPU against eager PyTorch, torch.compile and Liger-Kernel.

Forward and backward together over Qwen2.5-7B's vocabulary, with all rows labelled, and with the 15 % that a
vision-language pack has. The aims at 32 768 labelled rows: at most 10 % of eager's peak memory in at most 1.2 times its
time. Eager there needs about 80 GB. Not run yet for want of a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_kernels.checking.registry import Roofline
from eagle_kernels.checking.timing import Aim, Measurement, measure, ratios
from eagle_kernels.linear_cross_entropy import linear_cross_entropy
from eagle_kernels.linear_cross_entropy.entry import QWEN, QWEN_KNOWN, whole_roofline

HIDDEN, TOY_HIDDEN = 3584, 8
CASES = ((8_192, 1.0), (32_768, 1.0), (32_768, 0.15))  # rows of a pack, share of them that is labelled
TOY_CASES = ((16, 0.5),)
CHUNKS = (1024, 4096, 8192)  # rows whose logits exist at a time; 4096 is the default
OURS = "eagle_kernels, chunks of 4096"
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def measured(device: torch.device, toy: bool) -> Iterator[Measurement]:
    """All contenders on all cases."""
    for rows, labelled in TOY_CASES if toy else CASES:
        yield from _measured(rows, labelled, TOY_HIDDEN if toy else HIDDEN, device)


def aims(found: Sequence[Measurement], bandwidth: float | None) -> list[Aim]:
    """What was set out for, where both sides were measured."""
    case = _label(32_768, 1.0)
    memory = ratios(found, case, "eager", OURS, "peak_bytes")
    slower = ratios(found, case, "eager", OURS, "milliseconds")
    return [
        *(
            [Aim("linear_cross_entropy at 32K: <= 10 % of eager's memory", f"{memory:.1%}", memory <= 0.1)]
            if memory
            else []
        ),
        *(
            [Aim("linear_cross_entropy at 32K: <= 1.2 x eager's time", f"{slower:.2f} x", slower <= 1.2)]
            if slower
            else []
        ),
    ]


def _label(rows: int, labelled: float) -> str:
    return f"{rows} rows, {labelled:.0%} labelled"


def _measured(rows: int, labelled: float, width: int, device: torch.device) -> Iterator[Measurement]:
    """All contenders on one pack in bfloat16; peak memory counts what exists beyond hidden states and weight."""
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(QWEN, width, device=device) * 0.02).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(QWEN_KNOWN, (rows,), device=device)
    labels[int(rows * labelled) :] = -100
    token_weights = torch.rand(rows, device=device)
    roofline: Roofline = whole_roofline(int(rows * labelled), QWEN, width)
    for contender, loss in contenders().items():

        def forward_backward(loss: Loss = loss) -> object:
            return torch.autograd.grad(loss(hidden, weight, labels, token_weights), (hidden, weight))

        yield measure(device, _label(rows, labelled), contender, roofline, forward_backward)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """All logits, as float32 for the softmax, which is what Hugging Face and Megatron do."""
    losses = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    return (losses * token_weights).sum()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """Liger's has no token weights: a plain sum, the same work without the multiplication."""
    functional: Any = import_module("liger_kernel.transformers.functional")
    loss: Tensor = functional.liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return loss


def contenders() -> dict[str, Loss]:
    """Functions of (hidden, weight, labels, token weights), by the name they have in the report."""
    ours: dict[str, Loss] = {
        f"eagle_kernels, chunks of {rows}": lambda *tensors, rows=rows: (
            linear_cross_entropy(*tensors, vocabulary_size=QWEN_KNOWN, rows_per_chunk=rows).loss
        )
        for rows in CHUNKS
    }
    return ours | {"eager": eager, "torch.compile": torch.compile(eager), "Liger-Kernel": liger}
