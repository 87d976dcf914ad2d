"""One rank of a vocabulary split in two, run by test_linear_cross_entropy.py: python split_vocabulary.py RANK FOLDER.

A process of its own, because a process group needs several and Triton must be told to interpret before it is imported.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from eagle_kernels.linear_cross_entropy import linear_cross_entropy
from eagle_kernels.linear_cross_entropy.entry import Case, tensors

RANKS = 2
CASE = Case(12, 104, 24, known=91, rows_per_chunk=5)  # 52 columns a rank, the second with 13 of padding
ALL_PADDING = Case(7, 64, 8, known=30)  # the second rank's columns are all padding


def results(case: Case, rank: int, reduce_hidden_gradient: bool) -> dict[str, torch.Tensor]:
    """Losses and gradients of this rank."""
    hidden, weight, labels, token_weights = tensors(torch.device("cpu"), torch.float32, case)
    part = case.vocabulary // RANKS
    hidden.requires_grad_()
    weight = weight[rank * part : (rank + 1) * part].clone().requires_grad_()
    losses = linear_cross_entropy(
        hidden,
        weight,
        labels,
        token_weights,
        vocabulary_size=case.known,
        vocabulary_start=rank * part,
        process_group=dist.group.WORLD,
        reduce_hidden_gradient=reduce_hidden_gradient,
        rows_per_chunk=case.rows_per_chunk,
    )
    losses.loss.backward()
    return {"loss": losses.loss.detach(), "tokens": losses.tokens, "hidden": hidden.grad, "weight": weight.grad}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {
        "split": results(CASE, rank, True),
        "shares": results(CASE, rank, False),
        "all padding": results(ALL_PADDING, rank, True),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
