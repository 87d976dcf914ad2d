"""Encoders spread over all processes: same losses and weights as on the first stage, balanced, and never stuck."""

import random
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import spread_cases as cases
import torch
from PIL import Image
from spread_cases import ALL, STEPS, Outcome, make_step, with_spread
from train_cases import metrics, train, weights

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.tiling import count_tiles
from megatron_eagle.demo.dataset import generate
from megatron_eagle.parallel.shard_tiles import TileShards, shard_tiles, tile_balance

# Images in a thousand that become so many tiles (thumbnail included). Made up, not recorded: mostly small, long tail.
# Tiles an image, thumbnail included, to how many such images: recorded on 2026-11-20 with the default rule of tiling
# from every distinct raster image of at least 224 pixels a side that came with a Debian 12 system and this project's
# Python packages: photographs, screenshots, plots and icons, 114 files.
RECORDED = {1: 81, 3: 2, 4: 3, 5: 1, 7: 5, 10: 4, 13: 18}
_references: dict[Any, Outcome] = {}


def reference(worlds: Any, trainable: tuple[Any, ...] = ALL) -> Outcome:
    """One process with ``encoder: tensor``."""
    if trainable not in _references:
        _references[trainable] = worlds(1).run(cases.train, Layout(), trainable)[0]
    return _references[trainable]


def assert_same(outcomes: list[Outcome], expected: Outcome) -> None:
    for outcome in outcomes:
        count = len(outcome.losses)
        assert count and outcome.losses == pytest.approx(expected.losses[-count:], rel=1e-6)
        assert outcome.norms == pytest.approx(expected.norms[-count:], rel=1e-5)
        assert outcome.worst < 1e-5


# ---- who encodes what


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("tiles", [0, 1, 2, 7, 64, 1000, 3457])
def test_tiles_of_equal_cost_differ_by_one_at_most(tiles: int, ranks: int) -> None:
    shares = TileShards.of(tiles, ranks)
    assert shares.total == tiles
    assert max(shares.per_rank) - min(shares.per_rank) <= 1
    assert [tile for rank in range(ranks) for tile in shares.block(rank)] == list(range(tiles))


def test_no_rank_gets_more_than_the_mean_and_one_tile() -> None:
    chance = random.Random(1)
    for _ in range(200):
        costs = [chance.choice([0.3, 1.0, 2.6]) * chance.random() + 1e-3 for _ in range(chance.randint(1, 90))]
        ranks = chance.randint(1, 12)
        owners = shard_tiles(costs, ranks)
        assert owners == sorted(owners) and set(owners) <= set(range(ranks))
        loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
        assert max(loads) <= sum(costs) / ranks + max(costs) + 1e-9


def test_blocks_are_found_again_in_the_packs() -> None:
    shares = TileShards.of(11, 3)
    by_rank = [shares.block_by_pack(rank, [5, 0, 2, 4]) for rank in range(3)]
    assert [sum(counts) for counts in by_rank] == list(shares.per_rank)
    assert [sum(counts) for counts in zip(*by_rank, strict=True)] == [5, 0, 2, 4]


def test_balance_is_mean_over_max() -> None:
    assert tile_balance([4, 4, 4]) == 1.0
    assert tile_balance([6, 0, 0]) == pytest.approx(1 / 3)
    assert tile_balance([0, 0]) == 1.0


def steps_of(tiles_of_images: list[int], packs: int, pack_length: int, tokens_per_tile: int, text: int) -> list[int]:
    """Tiles in each step of ``packs`` packs that are filled with images, and ``text`` tokens for each, in order."""
    steps, pack, room, tiles = [], 0, pack_length, 0
    for count in tiles_of_images:
        need = count * tokens_per_tile + text
        if need > room:
            pack, room = pack + 1, pack_length
            if pack == packs:
                steps.append(tiles)
                pack, tiles = 0, 0
        room -= need
        tiles += count
    return steps


def mean_balance(steps: list[int], ranks: int) -> float:
    return sum(tile_balance(TileShards.of(tiles, ranks).per_rank) for tiles in steps) / len(steps)


def test_embedded_data_is_balanced_over_eight_processes(tmp_path: Path) -> None:
    tiling, counts = Tiling(tile_size=64), []
    generate(tmp_path, split="train", samples=600, seed=1)
    for path in sorted((tmp_path / "images").iterdir()):
        with Image.open(path) as image:
            counts.append(count_tiles(*image.size, tiling))
    assert max(counts) == 13 and min(counts) == 1
    steps = steps_of(counts, packs=8, pack_length=1024, tokens_per_tile=16, text=40)
    assert len(steps) >= 3 and mean_balance(steps, 8) >= 0.95


def test_recorded_heavy_tail_is_balanced_over_64_processes() -> None:
    counts = random.Random(3).choices(list(RECORDED), list(RECORDED.values()), k=40_000)
    steps = steps_of(counts, packs=64, pack_length=16_384, tokens_per_tile=256, text=230)
    assert len(steps) > 10 and mean_balance(steps, 64) >= 0.95


# ---- same numbers


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, Layout(tp=2, sequence_parallel=True)),
        (2, Layout(pp=2, vpp=2)),
        (2, Layout(cp=2)),
        (4, Layout(tp=2, pp=2)),
        (4, Layout(pp=2)),
        *(
            pytest.param(*others, marks=pytest.mark.long)
            for others in ((2, Layout(tp=2)), (2, Layout(pp=2)), (2, Layout()), (4, Layout(tp=2, cp=2)))
        ),
    ],
    ids=["sequence", "virtual", "cp", "tp-pp", "pp-dp", "tp", "pp", "dp", "tp-cp"],
)
def test_trains_like_one_process_with_encoders_of_its_own(worlds, processes: int, layout: Layout) -> None:
    """Four steps of ragged packs, clipped, with a learning rate per part; the second leaves ranks without a tile."""
    expected = reference(worlds)
    outcomes = worlds(processes).run(cases.train, with_spread(layout), ALL, expected.weights)
    assert_same(outcomes, expected)


@pytest.mark.parametrize(
    ("chunk", "options", "model"),
    [(1, {}, {}), (3, {}, {"recompute": "full"}), (None, {"distributed": False}, {}), (None, {"overlap": True}, {})],
    ids=["chunk-1", "chunk-3-recompute", "no-distributed-optimizer", "overlap"],
)
def test_options_change_nothing(worlds, chunk: int | None, options: dict[str, Any], model: dict[str, Any]) -> None:
    expected = reference(worlds)
    layout = with_spread(Layout(pp=2), encoder_chunk=chunk)
    assert_same(worlds(2).run(cases.train, layout, ALL, expected.weights, options, model), expected)


@pytest.mark.parametrize(
    "trainable",
    [
        ("connector",),
        ("vision", "connector"),
        pytest.param(("vision",), marks=pytest.mark.long),
        pytest.param(("language",), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_frozen_parts_stay_and_the_others_learn_the_same(worlds, trainable: tuple[Any, ...]) -> None:
    expected = reference(worlds, trainable)
    before = worlds(1).run(cases.train, Layout(), trainable, None, None, None, None, 0)[0].weights
    for chunk in (None, 2):
        layout = with_spread(Layout(pp=2), encoder_chunk=chunk)
        assert_same(worlds(2).run(cases.train, layout, trainable, expected.weights), expected)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], expected.weights[name])}
    assert moved == set(trainable)


@pytest.mark.parametrize(
    "distributed",
    [pytest.param(True, id="distributed-optimizer"), pytest.param(False, id="plain-optimizer", marks=pytest.mark.long)],
)
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (with_spread(Layout(pp=2)), Layout(tp=2)),
        (Layout(pp=2), with_spread(Layout(tp=2))),
        (with_spread(Layout(tp=2)), with_spread(Layout(pp=2))),
    ],
    ids=["spread-to-tensor", "tensor-to-spread", "spread-to-spread"],
)
def test_either_placement_continues_the_others_checkpoint(
    worlds, tmp_path: Path, saved: Layout, resumed: Layout, distributed: bool
) -> None:
    expected, options = reference(worlds), {"distributed": distributed}
    worlds(2).run(cases.train, saved, ALL, None, options, None, None, 2, tmp_path)
    checkpoint = tmp_path / "step_00000002"
    outcomes = worlds(2).run(cases.train, resumed, ALL, expected.weights, options, None, checkpoint)
    assert len(outcomes[0].losses) == len(STEPS) - 2
    assert_same(outcomes, expected)


# ---- never stuck


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(2, Layout(tp=2)), (4, Layout(pp=2)), (4, Layout(tp=2, pp=2))],
    ids=["tp", "pp-dp", "tp-pp"],
)
def test_every_process_of_a_group_issues_the_same_collectives(worlds, processes: int, layout: Layout) -> None:
    """Whatever its tiles: in the second step three of four processes have none."""
    calls = worlds(processes).run(cases.record, with_spread(layout), {})
    by_group: dict[tuple[int, ...], list[list[str]]] = defaultdict(lambda: [[] for _ in range(processes)])
    for rank, own in enumerate(calls):
        for name, members in own:
            assert rank in members
            by_group[members][rank].append(name)
    assert any("alltoall" in name for own in calls for name, _ in own)
    for members, sequences in by_group.items():
        assert len({tuple(sequences[rank]) for rank in members}) == 1, members


def pixels_of(layout: Layout, step: int) -> tuple[int, list[torch.Tensor], list[int]]:
    """(data-parallel rank, this process's tiles of each pack, slots of each pack); runs in every process of a world."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.distribute_batch import distribute_batch
    from megatron_eagle.parallel.groups import initialise

    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=30))
    batches = distribute_batch(lambda: make_step(step), groups, platform.device)
    return groups.dp_rank, [batch.tiles for batch in batches], [len(batch.tile_slots) for batch in batches]


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_each_tile_is_sent_to_one_process(worlds, step: int) -> None:
    results = worlds(4).run(pixels_of, with_spread(Layout(tp=2, pp=2)), step)
    packs = make_step(step)
    for number, pack in enumerate(packs):
        assert torch.equal(torch.cat([tiles[number] for _, tiles, _ in results]), pack.tiles)
        assert {slots[number] for _, _, slots in results} == {len(pack.tile_slots)}
    held = [sum(map(len, tiles)) for _, tiles, _ in results]
    assert max(held) - min(held) <= 1


def wrong_share(layout: Layout) -> str:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine

    recipe = cases.make_recipe(layout, ALL, {}, {})
    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=30))
    engine = build_engine(recipe, recipe.stages[0], platform, groups)
    try:
        engine.forward_backward(make_step(0))
    except ValueError as error:
        return str(error)
    return "no error"


def test_packs_that_were_not_handed_round_are_refused(worlds) -> None:
    message = worlds(2).run(wrong_share, with_spread(Layout(pp=2)))[1]
    assert message == "rank 1 has 9 of the step's 9 tiles, its share is 5"


# ---- a whole stage


def score(recipe_path: str, runs: str, data: str, out: str) -> None:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    folder = RunFolder(Path(runs) / recipe.name)
    evaluate(recipe, recipe.stage("second"), folder, Path(data), Path(out), install(), 2)


def test_stages_train_log_their_balance_and_are_scored(small_run, worlds, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = str(small_run.write_recipe(tmp_path / "alone.yaml"))
    spread = str(small_run.write_recipe(tmp_path / "spread.yaml", layout={"pp": 2, "encoder": "spread"}))
    for stage in ("first", "second"):
        worlds(1).run(train, alone, stage, str(one))
        worlds(2).run(train, spread, stage, str(two))
    theirs, ours = metrics(one), metrics(two)
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=2e-6)
    assert [entry["tiles"] for entry in ours] == [entry["tiles"] for entry in theirs]
    for entry in ours:
        assert entry["tile_balance"] == pytest.approx(entry["tiles"] / 2 / -(-entry["tiles"] // 2))
    assert {entry["tile_balance"] for entry in theirs} == {None}
    mine, yours = (worlds(1).run(weights, alone, "second", str(runs))[0] for runs in (two, one))
    assert all(torch.allclose(mine[name], yours[name], atol=1e-4) for name in yours)
    worlds(2).run(score, spread, str(two), str(small_run.folder / "heldout"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "accuracy.json").is_file()


def test_layout_refuses_chunks_of_encoders_that_are_not_spread() -> None:
    with pytest.raises(ValueError, match="encoder_chunk=4 needs encoder: spread"):
        Layout(encoder_chunk=4)
