"""A run whose packs are shared by as many processes as each needs has the samples and losses of any other run."""

import shutil
from pathlib import Path

import pytest
from train_cases import losses, train


@pytest.mark.slow
def test_it_trains_as_one_process_does_and_goes_on_in_another_layout(small_run, worlds, tmp_path: Path) -> None:
    stage = {**small_run.settings()["stages"][1], "batch": 4, "steps": 4, "checkpoint_every": 2}
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", stages=[stage]))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    worlds(1).run(train, recipe, "second", str(alone))
    worlds(2).run(train, recipe, "second", str(shared), ("layout.cp=2", "layout.least_cp=1"))
    wanted = losses(alone)
    assert_same(losses(shared), wanted)

    checkpoints = shared / "small" / "checkpoints" / "second"
    shutil.rmtree(checkpoints / "step_00000004")
    (checkpoints / "latest").write_text("step_00000002")
    worlds(1).run(train, recipe, "second", str(shared))
    assert_same(losses(shared), wanted)


def assert_same(found, wanted) -> None:
    assert [entry[3] for entry in found] == [entry[3] for entry in wanted] and len(found) == 4
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in wanted], rel=1e-6)
