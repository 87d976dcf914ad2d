"""What ``verify --recipe`` proves layouts on: the packs that training the recipe reads, and not others like them."""

from functools import partial
from pathlib import Path

import pytest

from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.data.stream.digest import digest_of, read_digest
from megatron_eagle.data.stream.streams import open_stage_stream
from megatron_eagle.errors import UserError
from megatron_eagle.training.log import read_metrics, sample_digest
from megatron_eagle.verification import subject
from megatron_eagle.verification.subject import STEPS, packs_of_a_step, recipe_rows, recipe_subject

ORDERS = {"planned": (), "buffer": ("reading.order=buffer", "reading.packing_buffer=16", "reading.shuffle_buffer=8")}


def train(recipe_path: str, stage: str, folder: str, overrides: tuple[str, ...]) -> None:
    """Runs in every process of a world."""
    from datetime import timedelta

    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder

    recipe, platform = load_recipe(Path(recipe_path), overrides), install()
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    StageRun(recipe, recipe.stage(stage), RunFolder(Path(folder)), platform, groups).train()


@pytest.mark.parametrize(("order", "processes"), [("planned", 2), ("planned", 1), ("buffer", 1)])
def test_the_packs_are_those_that_training_reads(small_run, worlds, tmp_path: Path, order: str, processes: int) -> None:
    path, overrides = small_run.write_recipe(tmp_path / "r.yaml"), ORDERS[order]
    for name, steps in (("first", 1), ("second", STEPS)):
        worlds(processes).run(train, str(path), name, str(tmp_path), (*overrides, f"stages.{name}.steps={steps}"))
    recipe = load_recipe(path, overrides)
    stage = recipe.stage("second")
    own = recipe_subject(recipe, stage)
    assert own.pack_length == stage.pack_length
    ids = [[pack.sample_ids for pack in packs] for packs in own.steps["packed"]]
    assert [len(packs) for packs in ids] == [stage.batch] * STEPS
    trained = [record.sample_digest for record in read_metrics(tmp_path)["second"]]
    assert [sample_digest(sum(packs, [])) for packs in ids] == trained
    if order == "planned":
        read = read_digest(partial(open_stage_stream, recipe, stage), 1, STEPS * stage.batch, stage.batch)
        assert digest_of(enumerate(sum(ids, []))) == read.sha256


def test_large_steps_are_cut_and_every_row_gets_its_packs(small_run, tmp_path: Path) -> None:
    recipe = small_run.recipe(tmp_path / "r.yaml", ("stages.first.batch=64",))
    assert packs_of_a_step(recipe, recipe.stages[0]) == 4
    assert {row.dp for row in recipe_rows(recipe, 4)} == {1, 2} and {row.dp for row in recipe_rows(recipe, 3)} == {1}
    interleaved = ("layout.pp=4", "layout.vpp=2", "model.language.num_hidden_layers=8", "stages.first.batch=64")
    recipe = small_run.recipe(tmp_path / "r.yaml", interleaved)
    assert packs_of_a_step(recipe, recipe.stages[0]) == 8


def test_the_layout_of_every_stage_is_proved(small_run, tmp_path: Path) -> None:
    recipe = small_run.recipe(tmp_path / "r.yaml", ("layout.pp=2", "stages.second.layout.tp=2"))
    assert [(row.tp, row.pp, row.dp) for row in recipe_rows(recipe, 2)] == [(1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)]


def test_packs_that_this_machine_cannot_hold_are_refused(small_run, tmp_path: Path, monkeypatch) -> None:
    recipe = small_run.recipe(tmp_path / "r.yaml")
    monkeypatch.setattr(subject, "memory_bytes", lambda: 10**6)
    with pytest.raises(UserError, match=r"pack of 512 tokens over a vocabulary of 400 need .* GB, this machine has 0"):
        recipe_subject(recipe, recipe.stages[0])
