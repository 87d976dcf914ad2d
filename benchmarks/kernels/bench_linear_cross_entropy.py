"""linear_cross_entropy on a GPU against eager PyTorch, torch.compile and Liger-Kernel (if installed).

    PYTHONPATH=kernels python benchmarks/kernels/bench_linear_cross_entropy.py

Forward and backward together over Qwen2.5-7B's vocabulary, with all rows labelled, and with the 15 % that a
vision-language pack has. The aims at 32 768 labelled rows: at most 10 % of eager's peak memory in at most 1.2 times its
time. Eager there needs about 80 GB. Not run yet for want of a GPU.
"""

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from eagle_kernels.checking.registry import Roofline
from eagle_kernels.linear_cross_entropy import linear_cross_entropy
from eagle_kernels.linear_cross_entropy.entry import QWEN, QWEN_KNOWN, whole_roofline
from harness import Measurement, arguments, copy_bandwidth, measure, require_gpu, write_report
from torch import Tensor

HIDDEN = 3584
CASES = ((8_192, 1.0), (32_768, 1.0), (32_768, 0.15))  # rows of a pack, share of them that is labelled
CHUNKS = (1024, 4096, 8192)  # rows whose logits exist at a time; 4096 is the default
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measures every case and writes the report."""
    folder = arguments(__doc__.splitlines()[0])
    device = require_gpu()
    found = [one for rows, labelled in CASES for one in measured(rows, labelled, device)]
    write_report("linear_cross_entropy", found, copy_bandwidth(device), folder)


def measured(rows: int, labelled: float, device: torch.device) -> Iterator[Measurement]:
    """All contenders on one pack in bfloat16; peak memory counts what exists beyond hidden states and weight."""
    hidden = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(QWEN, HIDDEN, device=device) * 0.02).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(QWEN_KNOWN, (rows,), device=device)
    labels[int(rows * labelled) :] = -100
    token_weights = torch.rand(rows, device=device)
    roofline: Roofline = whole_roofline(int(rows * labelled), QWEN, HIDDEN)
    for contender, loss in contenders().items():

        def forward_backward(loss: Loss = loss) -> object:
            return torch.autograd.grad(loss(hidden, weight, labels, token_weights), (hidden, weight))

        yield measure(f"{rows} rows, {labelled:.0%} labelled", contender, roofline, forward_backward)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """All logits, as float32 for the softmax, which is what Hugging Face and Megatron do."""
    losses = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    return (losses * token_weights).sum()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """Liger's has no token weights: a plain sum, the same work without the multiplication."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")


def contenders() -> dict[str, Loss]:
    """Functions of (hidden, weight, labels, token weights), by the name they have in the report."""
    ours = {
        f"eagle_kernels, chunks of {rows}": lambda *tensors, rows=rows: (
            linear_cross_entropy(*tensors, vocabulary_size=QWEN_KNOWN, rows_per_chunk=rows).loss
        )
        for rows in CHUNKS
    }
    others: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager)}
    if importlib.util.find_spec("liger_kernel"):
        others["Liger-Kernel"] = liger
    return ours | others


if __name__ == "__main__":
    main()
