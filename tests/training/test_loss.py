"""The square-root average against its definition, in float64."""

import math

import pytest
import torch

from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.training.loss import normalise_weights


def pack(*label_counts: int, length: int = 32) -> PackedBatch:
    """A pack whose i-th sample has ``label_counts[i]`` labelled tokens after three unlabelled ones."""
    labels, weights = [], []
    for count in label_counts:
        labels += [IGNORE_LABEL] * 3 + [1] * count
        weights += [0.0] * 3 + [1 / math.sqrt(count)] * count if count else [0.0] * 3
    labels += [IGNORE_LABEL] * (length - len(labels))
    weights += [0.0] * (length - len(weights))
    return PackedBatch(
        tokens=torch.zeros(length, dtype=torch.int64),
        labels=torch.tensor(labels),
        loss_weights=torch.tensor(weights),
        position_ids=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        tiles=torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        tile_slots=torch.zeros(0, dtype=torch.int64),
        sample_ids=[],
        useful_tokens=length,
    )


def losses_by_sample(
    packs: list[PackedBatch], losses: list[torch.Tensor], counts: list[list[int]]
) -> list[tuple[int, float]]:
    """(n_i, mean loss of sample i), taken apart without looking at the weights."""
    found = []
    for batch, loss, sizes in zip(packs, losses, counts, strict=True):
        labelled = loss[batch.labels != IGNORE_LABEL].double()
        found += [(len(part), float(part.mean())) for part in labelled.split(sizes)]
    return found


def weighted_loss(losses: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """What the model makes of cross entropies [L]."""
    return (losses * batch.loss_weights).sum()


COUNTS = [[4, 9, 1], [16], [2, 2, 5]]


@pytest.fixture
def packs_and_losses() -> tuple[list[PackedBatch], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [pack(*counts) for counts in COUNTS], [torch.rand(32, generator=generator) for _ in COUNTS]


def test_global_normaliser_is_the_square_root_average_of_all_samples(packs_and_losses) -> None:
    packs, losses = packs_and_losses
    samples = losses_by_sample(packs, losses, COUNTS)
    expected = sum(math.sqrt(n) * mean for n, mean in samples) / sum(math.sqrt(n) for n, _ in samples)
    weighted = normalise_weights(packs, "global", packs_in_step=3, data_parallel_group=None)
    got = sum(weighted_loss(loss, batch) for loss, batch in zip(losses, weighted, strict=True))
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_pack_normaliser_is_the_mean_over_packs(packs_and_losses) -> None:
    packs, losses = packs_and_losses
    expected = 0.0
    for batch, loss, counts in zip(packs, losses, COUNTS, strict=True):
        samples = losses_by_sample([batch], [loss], [counts])
        expected += sum(math.sqrt(n) * mean for n, mean in samples) / sum(math.sqrt(n) for n, _ in samples) / len(packs)
    weighted = normalise_weights(packs, "pack", packs_in_step=3, data_parallel_group=None)
    got = sum(weighted_loss(loss, batch) for loss, batch in zip(losses, weighted, strict=True))
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_where_a_sample_is_packed_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    by_sample = {count: torch.rand(count, generator=generator) for count in (3, 7, 12)}

    def total(arrangement: list[list[int]]) -> float:
        packs = [pack(*counts) for counts in arrangement]
        weighted = normalise_weights(packs, "global", packs_in_step=len(packs), data_parallel_group=None)
        result = 0.0
        for batch, counts in zip(weighted, arrangement, strict=True):
            loss = torch.full((32,), 99.0)  # a loss where there is no label must not count
            loss[batch.labels != IGNORE_LABEL] = torch.cat([by_sample[count] for count in counts])
            result += float(weighted_loss(loss, batch))
        return result

    assert total([[3, 7, 12]]) == pytest.approx(total([[12], [7, 3]]), rel=1e-6)
    assert total([[3], [7], [12]]) == pytest.approx(total([[12], [7, 3]]), rel=1e-6)


def test_a_step_without_any_label_has_loss_zero() -> None:
    packs = [pack(), pack()]
    for mode in ("global", "pack"):
        weighted = normalise_weights(packs, mode, packs_in_step=2, data_parallel_group=None)
        assert float(sum(weighted_loss(torch.ones(32), batch) for batch in weighted)) == 0.0
