"""linear_cross_entropy against float64, alone and over two ranks, in poisoned memory; and whether these tests can fail.

As a program, ``test_linear_cross_entropy.py RANK FOLDER``, this file is one of the two ranks: each needs a process of
its own, in which Triton interprets.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from eagle_kernels.linear_cross_entropy import kernels, linear_cross_entropy, op, reference
from eagle_kernels.linear_cross_entropy.entry import FP32, GPU_CHECKS, Case, tensors, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

interpreter = pytest.mark.interpreter
CPU = torch.device("cpu")


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden and weight with gradients, labels, token weights."""
    hidden, weight, labels, token_weights = tensors(CPU, dtype, case)
    return [hidden.requires_grad_(), weight.requires_grad_(), labels, token_weights]


def test_the_reference_is_a_weighted_sum_of_cross_entropies():
    hidden, weight, labels, token_weights = (tensor.detach() for tensor in inputs(Case(9, 20, 4, known=17)))
    loss, token_losses = reference.linear_cross_entropy(hidden, weight, labels, token_weights, vocabulary_size=17)
    by_hand = 0.0
    for x, label, token_weight in zip(hidden, labels, token_weights, strict=True):
        if label != -100:
            by_hand -= token_weight * F.log_softmax(weight[:17] @ x, 0)[label]
    torch.testing.assert_close(loss, by_hand)
    assert torch.equal(token_losses == 0, labels == -100)


@interpreter
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 12),
    vocabulary=st.integers(1, 150),
    padding=st.integers(0, 40),
    hidden=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    rows_per_chunk=st.sampled_from([1, 5, 4096]),
    block=st.sampled_from([16, 64, 4096]),
)
def test_values_and_gradients(rows, vocabulary, padding, hidden, ignored, rows_per_chunk, block):
    case = Case(rows, vocabulary + padding, hidden, vocabulary, ignored, rows_per_chunk)
    torch.use_deterministic_algorithms(True)  # new memory then holds NaN until it is written
    try:
        assert torch.empty(3).isnan().all()
        with patch.object(kernels, "BLOCK", block):
            assert worst_error(CPU, torch.float32, case) <= FP32
    finally:
        torch.use_deterministic_algorithms(False)


@interpreter
def test_logits_that_would_overflow():
    hidden, weight, labels, token_weights = inputs(Case(6, 50, 8, ignored=0.0, scale=60.0))
    losses = linear_cross_entropy(hidden, weight, labels, token_weights)
    expected, _ = reference.linear_cross_entropy(hidden.double(), weight.double(), labels, token_weights)
    torch.testing.assert_close(losses.loss.double(), expected, rtol=1e-5, atol=0.0)


@interpreter
def test_token_weights_default_to_one_and_padding_gets_no_gradient():
    hidden, weight, labels, _ = inputs(Case(8, 40, 8, known=33))
    losses = linear_cross_entropy(hidden, weight, labels, vocabulary_size=33)
    torch.testing.assert_close(losses.loss, losses.tokens.sum())
    losses.loss.backward()
    assert not weight.grad[33:].any() and weight.grad[:33].any(1).all()
    assert not hidden.grad[labels == -100].any()
    assert not losses.tokens.requires_grad


@interpreter
def test_another_mark_for_ignored_rows():
    hidden, weight, labels, token_weights = inputs(Case(8, 40, 8))
    expected = linear_cross_entropy(hidden, weight, labels, token_weights).loss
    relabelled = torch.where(labels == -100, -1, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, relabelled, token_weights, ignore_label=-1).loss, expected)


@interpreter
def test_backward_twice_adds_up():
    hidden, weight, labels, token_weights = inputs(Case(8, 40, 8))
    loss = linear_cross_entropy(hidden, weight, labels, token_weights).loss
    loss.backward(retain_graph=True)
    once = [hidden.grad.clone(), weight.grad.clone()]
    (2 * loss).backward()
    torch.testing.assert_close([hidden.grad, weight.grad], [3 * tensor for tensor in once])


@interpreter
def test_weight_gradients_of_many_chunks_are_added_in_float32():
    """300 equal rows in 100 chunks: sums in bfloat16 would stop growing long before."""
    hidden = torch.ones(300, 8, dtype=torch.bfloat16)
    weight = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.int64), rows_per_chunk=3).loss.backward()
    expected = torch.full((16, 8), 300 / 16)
    expected[0] -= 300
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-8, atol=0.0)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any PyTorch operation returned, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        sizes = [leaf.numel() for leaf in found]  # (the interpreter's copies of memory are bytes)
        self.elements = max([self.elements, *sizes])
        self.products += "mm" in function.name()
        return result


@interpreter
@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)], ids=str
)
def test_only_what_is_needed_is_made(frozen, products):
    """Never the logits of all rows, and no matrix product for a gradient that nobody wants."""
    rows, vocabulary, width, per_chunk = 64, 500, 4, 8
    hidden, weight, labels, token_weights = inputs(Case(rows, vocabulary, width, ignored=0.0))
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    with Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, labels, token_weights, rows_per_chunk=per_chunk).loss
        if loss.requires_grad:
            loss.backward()
    assert seen.elements == per_chunk * vocabulary
    assert seen.products == products * rows // per_chunk


RANKS = 2
SPLIT = Case(12, 104, 24, known=91, rows_per_chunk=5)  # 52 columns a rank, the second with 13 of padding
ALL_PADDING = Case(7, 64, 8, known=30)  # of the second rank's columns, all are padding


def one_rank(rank: int, folder: Path) -> None:
    """Meets the other rank and leaves what it found in ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {
        "split": results_of_rank(SPLIT, rank, reduce_hidden_gradient=True),
        "shares": results_of_rank(SPLIT, rank, reduce_hidden_gradient=False),
        "all padding": results_of_rank(ALL_PADDING, rank, reduce_hidden_gradient=True),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def results_of_rank(case: Case, rank: int, reduce_hidden_gradient: bool) -> dict[str, Tensor]:
    hidden, weight, labels, token_weights = inputs(case)
    part = weight.detach().chunk(RANKS)[rank].clone().requires_grad_()
    losses = linear_cross_entropy(
        hidden,
        part,
        labels,
        token_weights,
        vocabulary_size=case.known,
        vocabulary_start=rank * len(part),
        process_group=dist.group.WORLD,
        reduce_hidden_gradient=reduce_hidden_gradient,
        rows_per_chunk=case.rows_per_chunk,
    )
    losses.loss.backward()
    return {"loss": losses.loss.detach(), "tokens": losses.tokens, "hidden": hidden.grad, "weight": part.grad}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What ``one_rank`` found on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    packages = Path(kernels.__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(packages)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"), [("split", SPLIT), ("all padding", ALL_PADDING)], ids=["split", "all padding"]
)
def test_a_split_vocabulary_gives_what_the_whole_gives(two_ranks, name, case):
    hidden, weight, labels, token_weights = (tensor.detach().double() for tensor in inputs(case))
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, token_losses = reference.linear_cross_entropy(
        hidden, weight, labels.long(), token_weights, vocabulary_size=case.known
    )
    loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    for found in (rank[name] for rank in two_ranks):
        torch.testing.assert_close(found["loss"].double(), loss, **close)
        torch.testing.assert_close(found["tokens"].double(), token_losses, **close)
        torch.testing.assert_close(found["hidden"].double(), hidden.grad, **close)
    parts = torch.cat([rank[name]["weight"] for rank in two_ranks])
    torch.testing.assert_close(parts.double(), weight.grad, **close)


@pytest.mark.slow
def test_ranks_agree_bit_for_bit_and_shares_add_up(two_ranks):
    first, second = two_ranks
    for key in ("loss", "tokens", "hidden"):
        assert torch.equal(first["split"][key], second["split"][key])
    total = first["shares"]["hidden"] + second["shares"]["hidden"]
    assert not torch.equal(first["shares"]["hidden"], second["shares"]["hidden"])
    torch.testing.assert_close(total, first["split"]["hidden"], rtol=1e-5, atol=1e-6)


MUTATIONS = {
    "tail of the vocabulary dropped": ("range(0, known, BLOCK)", "range(0, known - BLOCK + 1, BLOCK)"),
    "padding counted": ("mask=column < known, other", "mask=column < columns, other"),
    "label of the neighbour": ("column == label", "column == label + 1"),
    "weight forgotten": ("weight * (probability", "(probability"),
    "sum not rescaled": ("total * tl.exp2((maximum - higher) * LOG2_E) + tl", "total + tl"),
    "lanes not joined": ("tl.sum(total * tl.exp2((maximum - row_maximum) * LOG2_E), 0)", "tl.sum(total, 0)"),
    "padded columns left unwritten": ("mask=column < columns)", "mask=column < known)"),
}


@interpreter
@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_mutated_kernel_is_caught(mutation, mutate, monkeypatch):
    module = mutate(kernels, *MUTATIONS[mutation]) if mutation else kernels
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(op, "kernels", module)
    passed = worst_error(CPU, torch.float32, Case(9, 104, 24, known=91)) <= FP32
    assert passed == (mutation is None), mutation or "the kernel as it stands"


@interpreter
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.tensor([1, -100, 40, 3])}, r"label 40 in row 2 .* vocabulary 0 to 39 .*\(1 such rows\)"),
        ({"labels": torch.tensor([1, -7, 0, 3])}, "label -7 in row 1"),
        ({"weight": torch.zeros(40, 9)}, r"\[4, 8\] and \[40, 9\]"),
        ({"hidden": torch.zeros(4, 8).half(), "weight": torch.zeros(40, 8).half()}, "float16 is left out"),
        ({"token_weights": torch.ones(4, dtype=torch.float64)}, r"float32 \[4\], got torch.float64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \[4\]"),
        ({"vocabulary_start": 40}, "needs vocabulary_size"),
        ({"rows_per_chunk": 0}, "at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(change, said):
    good = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(40, 8), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(**(good | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("check", GPU_CHECKS, ids=lambda check: check.label)
def test_on_the_gpu(check):
    assert check.run(torch.device("cuda")) <= check.tolerance


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
