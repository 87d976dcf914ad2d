"""The verifier can fail: five mistakes that trainers really make are made on purpose, and each is found."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.verification import check
from megatron_eagle.verification.check import TOLERANCES, Verifier
from megatron_eagle.verification.rows import Row


def with_dropped_gradients(row: Row, folder: str) -> tuple[float, float, float]:
    """The features of all tiles but the first carry no gradient home (an autograd hole, as in a detached gather)."""
    from megatron_eagle.model.connector import Connector

    forward = Connector.forward

    def leaky(self: Connector, features: torch.Tensor) -> torch.Tensor:
        out = forward(self, features)
        return torch.cat([out[:1], out[1:].detach()])

    with patch.object(Connector, "forward", leaky):
        return check.measure(row, folder)


def with_shifted_segments(row: Row, folder: str) -> tuple[float, float, float]:
    """The border between the first two segments of every pack lies one token too far right."""
    from megatron_eagle.training.step import Step

    normalise = Step.normalise

    def shifted(*arguments):
        found = normalise(*arguments)
        for batch in found:
            if len(batch.cu_seqlens) > 2:
                batch.cu_seqlens[1] += 1
                batch.borders = tuple(batch.cu_seqlens.tolist())
        return found

    with patch.object(Step, "normalise", shifted):
        return check.measure(row, folder)


def with_forgotten_scale(row: Row, folder: str) -> tuple[float, float, float]:
    """Gradients are averaged over the data-parallel processes although the weights hold the global denominator."""
    from megatron_eagle.training.engine import Engine

    forward_backward = Engine.forward_backward

    def averaged(self, batches):
        loss = forward_backward(self, batches)
        for owner in self.gradient_owners():
            owner.scale_gradients(1.0 / row.dp)
        return loss

    with patch.object(Engine, "forward_backward", averaged):
        return check.measure(row, folder)


def with_exchanged_shares(row: Row, folder: str) -> tuple[float, float, float]:
    """In groups that share a pack each process takes the positions of its neighbour."""
    from megatron_eagle.parallel.groups import ContextShard

    def neighbours(ring, ulysses, rank):
        return ContextShard(ring, ulysses, rank ^ 1 if ring > 1 else rank)

    with patch("megatron_eagle.parallel.groups.ContextShard", neighbours):
        return check.measure(row, folder)


def with_doubled_packs(row: Row, folder: str) -> tuple[float, float, float]:
    """A pack shared by two is counted by both, as if each had a whole replica's."""
    from megatron_eagle.training.engine import Engine

    run_own = Engine._run_own

    def doubled(self, own, batches, features):
        size = {one.pack: one.context.share.ring for one in own}
        more = [replace(b, loss_weights=b.loss_weights * size.get(number, 1)) for number, b in enumerate(batches)]
        return run_own(self, own, more, features)

    with patch.object(Engine, "_run_own", doubled):
        return check.measure(row, folder)


SHARED = Row(cp=2, dp=2, least_cp=1, packing="single")  # two of a replica's packs have a process each, two have both


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("mistake", "row", "distance"),
    [
        (with_dropped_gradients, Row(pp=2), "grad_rel"),
        (with_shifted_segments, Row(pp=2), "loss_rel"),
        (with_forgotten_scale, Row(dp=2), "grad_rel"),
        (with_exchanged_shares, SHARED, "loss_rel"),
        (with_doubled_packs, SHARED, "loss_rel"),
    ],
    ids=["dropped gradient", "off-by-one segment", "forgotten scale", "neighbour's share", "pack counted twice"],
)
def test_a_mistake_makes_the_row_wrong(verifier: Verifier, mistake, row: Row, distance: str) -> None:
    result = verifier.check(row, measure=mistake)
    assert result.error is None, result.error
    assert not result.ok
    # Not by a hair: the mistake is far above what rounding could do.
    limits = {"loss_rel": TOLERANCES["fp32"].loss, "grad_rel": TOLERANCES["fp32"].gradient}
    assert getattr(result, distance) > 100 * limits[distance]


@pytest.mark.long  # their options are those of rows of the quick table, whose test is with the quick ones
def test_the_same_rows_without_a_mistake_are_right(verifier: Verifier) -> None:
    for row in (Row(pp=2), Row(dp=2), SHARED, Row(cp=4, least_cp=2, encoder="spread", packing="single")):
        result = verifier.check(row)
        assert result.ok, result


def test_a_row_that_cannot_run_is_wrong_and_says_why(verifier: Verifier) -> None:
    result = verifier.check(Row(dp=2), measure=fail)
    assert not result.ok and "rank 1 of 2" in result.error and "the wheels came off" in result.error


def fail(row: Row, folder: str) -> tuple[float, float, float]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise RuntimeError("the wheels came off")
    return 0.0, 0.0, 0.0
