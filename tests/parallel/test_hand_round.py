"""Packs distributed within a replica arrive whole, everywhere, and so does a reader's failure."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_eagle.config.layout import Layout
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.errors import UserError

LENGTH = 24


def make_batches(seed: int, tile_counts: list[int]) -> list[PackedBatch]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, tiles in enumerate(tile_counts):
        borders = torch.tensor([0, 5 + number, LENGTH], dtype=torch.int32)
        batches.append(
            PackedBatch(
                tokens=torch.randint(0, 1 << 40, (LENGTH,), generator=generator),
                labels=torch.randint(-100, 50, (LENGTH,), generator=generator),
                loss_weights=torch.rand(LENGTH, generator=generator),
                position_ids=torch.arange(LENGTH),
                cu_seqlens=borders,
                tiles=torch.randint(0, 256, (tiles, 3, 4, 4), dtype=torch.uint8, generator=generator),
                tile_slots=torch.arange(tiles),
                sample_ids=[f"ä-{number}", "b"],
                useful_tokens=LENGTH - number,
                rejected=[("c", "truncated image")] * number,
            )
        )
    return batches


def hand_round_in_world(layout: Layout, tile_counts: list[int]) -> tuple[Any, list[PackedBatch]]:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.distribute_batch import distribute_batch
    from megatron_eagle.parallel.groups import initialise

    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=30))

    def read() -> list[PackedBatch]:
        assert groups.is_reader, "only the reader may read"
        return make_batches(groups.dp_rank, tile_counts)

    place = (groups.dp_rank, groups.is_first_stage)
    return place, distribute_batch(read, groups, platform.device)


def fail_in_world(layout: Layout) -> str:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.distribute_batch import distribute_batch
    from megatron_eagle.parallel.groups import initialise

    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=30))

    def read() -> list[PackedBatch]:
        raise UserError("1000 samples in a row are broken")

    try:
        distribute_batch(read, groups, platform.device)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("tile_counts", [[2, 3], [0, 1], [0, 0], [1]], ids=str)
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, pp=2), Layout(pp=2), Layout(tp=2)], ids=lambda layout: f"tp{layout.tp}pp{layout.pp}"
)
def test_every_process_of_a_replica_gets_its_readers_packs(worlds, layout: Layout, tile_counts: list[int]) -> None:
    for (dp_rank, hosts_encoders), batches in worlds(4).run(hand_round_in_world, layout, tile_counts):
        expected = make_batches(dp_rank, tile_counts)
        assert len(batches) == len(expected)
        for batch, want in zip(batches, expected, strict=True):
            for name in ("tokens", "labels", "loss_weights", "position_ids", "cu_seqlens"):
                assert torch.equal(getattr(batch, name), getattr(want, name)), name
                assert getattr(batch, name).dtype == getattr(want, name).dtype, name
            assert (batch.sample_ids, batch.useful_tokens, batch.rejected) == (
                want.sample_ids,
                want.useful_tokens,
                want.rejected,
            )
            if hosts_encoders:
                assert torch.equal(batch.tiles, want.tiles) and torch.equal(batch.tile_slots, want.tile_slots)
            else:
                assert len(batch.tiles) == len(batch.tile_slots) == 0


def test_a_readers_failure_is_raised_on_every_process(worlds) -> None:
    assert worlds(4).run(fail_in_world, Layout(tp=2, pp=2)) == ["1000 samples in a row are broken"] * 4
