"""Training checkpoints: damage is found and named, a killed save leaves the checkpoint before it, both whole."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_eagle.checkpoint import checksums
from megatron_eagle.checkpoint.files import find_latest, read_description
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError

FILES = {"one.distcp": b"a" * 5000, "two.distcp": b"b" * 70, "checkpoint.json": b"{}"}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    checksums.write(tmp_path, checksums.measure(tmp_path.iterdir()))
    return tmp_path


def test_an_undamaged_checkpoint_passes(folder):
    checksums.verify(folder)
    assert json.loads((folder / checksums.CHECKSUMS).read_text()).keys() == FILES.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_flipped_bit_truncation_and_loss_is_named(folder, name):
    file, content = folder / name, FILES[name]
    generator = random.Random(name)
    for _ in range(20):
        place = generator.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        assert checksums.damage(folder) == [f"{name} has other bytes than were written"]
    file.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=f"{name} has {len(content) - 1} bytes, {len(content)} were written.*'submit' of its recipe"
    ):
        checksums.verify(folder)
    file.unlink()
    assert checksums.damage(folder) == [f"{name} is missing"]


def test_damaged_checksums_are_damage(folder):
    (folder / checksums.CHECKSUMS).write_text('{"one.distcp": 3}')
    assert "checksums.json cannot be read" in checksums.damage(folder)[0]


def damage_and_train(recipe_path, runs, fallback, stage="first"):
    """Runs in every process of a world: the error of continuing, or None."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    platform = install()
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    stage, run_folder = recipe.stage(stage), RunFolder(Path(runs) / recipe.name)
    try:
        StageRun(recipe, stage, run_folder, platform, groups, fallback=fallback).train()
    except UserError as error:
        return str(error)
    return None


def test_a_damaged_newest_checkpoint_stops_training_unless_fallback_is_asked_for(small_run, worlds, tmp_path):
    stages = small_run.settings()["stages"]
    stages[0].update(steps=6, checkpoint_every=2)
    recipe = str(small_run.write_recipe(tmp_path / "recipe.yaml", stages=stages))
    assert worlds(1).run(damage_and_train, recipe, str(tmp_path), False) == [None]
    folder = tmp_path / "small" / "checkpoints" / "first"
    whole = {step: folder / f"step_{step:08d}" for step in (4, 6)}
    expected = TorchDist(whole[6]).read("connector.linear_fc1.weight")
    shutil.rmtree(whole[6])
    (folder / "latest").write_text(whole[4].name)
    shutil.copytree(folder / whole[4].name, folder / "kept")
    shard = max(whole[4].glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    (error,) = worlds(1).run(damage_and_train, recipe, str(tmp_path), False)
    words = rf"step_00000004 is damaged: {shard.name} has other bytes.*\. The same command with --fallback: 'first' "
    cost = r"(goes on from .*step_00000002, and 2|starts anew, because .*, and 4) of its 6 steps are trained again"
    assert re.search(words + cost, error)
    older = folder / "step_00000002"
    if not older.exists():  # keep_checkpoints may have removed it
        shutil.copytree(folder / "kept", older)
    assert worlds(1).run(damage_and_train, recipe, str(tmp_path), True) == [None]
    assert torch.equal(TorchDist(whole[6]).read("connector.linear_fc1.weight"), expected)


def test_damage_in_the_stage_before_names_the_way_on_and_what_it_costs(small_run, worlds, tmp_path):
    stages = small_run.settings()["stages"]
    stages[0].update(steps=5, checkpoint_every=2)
    stages[1].update(steps=1)
    recipe = str(small_run.write_recipe(tmp_path / "recipe.yaml", stages=stages))
    assert worlds(1).run(damage_and_train, recipe, str(tmp_path), False) == [None]
    last = tmp_path / "small" / "checkpoints" / "first" / "step_00000005"
    content = bytearray((last / "checkpoint.json").read_bytes())
    content[1] ^= 4
    (last / "checkpoint.json").write_bytes(content)
    (error,) = worlds(1).run(damage_and_train, recipe, str(tmp_path), False)  # read while joining
    assert f"{last} is not a checkpoint of megatron-eagle" in error and "step_00000004, and 1 of its 5 steps" in error
    for fallback in (False, True):  # of the second stage, which cannot help itself
        (error,) = worlds(1).run(damage_and_train, recipe, str(tmp_path), fallback, "second")
        assert f"{last} is not a checkpoint of megatron-eagle: its checkpoint.json" in error
        assert "same command with '--fallback' and '--stage first' (of submit: '--stages first,second')" in error
        assert "'first' goes on from" in error and "step_00000004, and 1 of its 5 steps are trained again" in error
    assert worlds(1).run(damage_and_train, recipe, str(tmp_path), True) == [None]
    assert worlds(1).run(damage_and_train, recipe, str(tmp_path), False, "second") == [None]


def unreadable_and_train(recipe_path, runs, rank, fallback=False):
    """``damage_and_train``, but the newest ``checkpoint.json`` cannot be read by one of the processes."""
    import torch.distributed as dist

    from megatron_eagle.training.loop import StageRun

    read_text, train = Path.read_text, StageRun.train

    def read(file, *args, **settings):
        if file.name == "checkpoint.json" and file.parent.name == "step_00000004":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_text(file, *args, **settings)

    def begin(run):
        if dist.get_rank() == rank:
            patch.setattr(Path, "read_text", read)
        train(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "train", begin)
        return damage_and_train(recipe_path, runs, fallback)


def test_a_disk_that_fails_one_process_is_everybodys_failure_or_nobodys(small_run, worlds, tmp_path):
    """One process alone must not go looking for another checkpoint while the others wait for something else."""
    stage = {**small_run.settings()["stages"][0], "checkpoint_every": 2}
    recipes = [
        str(small_run.write_recipe(tmp_path / f"{steps}.yaml", stages=[{**stage, "steps": steps}])) for steps in (4, 5)
    ]
    assert worlds(2).run(damage_and_train, recipes[0], str(tmp_path), False) == [None, None]
    errors = worlds(2).run(unreadable_and_train, recipes[1], str(tmp_path), 0)
    assert errors[0] == errors[1] and "Stale file handle" in errors[0], errors
    assert "goes on from" in errors[0] and "starts anew" not in errors[0]
    assert worlds(2).run(unreadable_and_train, recipes[1], str(tmp_path), 1) == [None, None], "rank 0 reads for all"


def save_for_ever(stage_folder, recipe_path):
    """A forked trainer without data: a save has its step as every weight; they change while it is written."""
    import torch.distributed as dist

    from megatron_eagle.checkpoint.files import Description
    from megatron_eagle.checkpoint.saver import Saver
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine

    recipe = load_recipe(Path(recipe_path))
    platform = install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    engine = build_engine(recipe, recipe.stage("first"), platform, groups)
    engine.update()  # Adam has nothing to save before its first step
    saver = Saver(stage_folder, groups, platform.device, keep=2)
    latest = find_latest(stage_folder)
    step = read_description(latest).step if latest else 0

    def fill(value):
        with torch.no_grad():
            for model in engine.models:
                for parameter in model.parameters():
                    parameter.fill_(value)

    while True:
        step += 1
        fill(step)
        saver.start(Description("first", step, 10**6, {}, {}, 1), engine.state(), b"x")
        for number in range(1, 1 + step % 40):  # sometimes the next save has to wait for this one
            fill(-number)
            saver.after_step()
            time.sleep(0.001)


def kill_while_saving(small_run, tmp_path, kills, seed):
    """After every kill the newest checkpoint is whole, newer than before, and of one step; how many hit a save."""
    generator = random.Random(seed)
    recipe = str(small_run.write_recipe(tmp_path / "recipe.yaml"))
    folder = tmp_path / "first"
    done, before, amid = 0, 0, 0
    while done < kills:
        child = os.fork()
        if child == 0:
            os.close(2)
            try:
                save_for_ever(folder, recipe)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 100
        while (latest := find_latest(folder)) is None or read_description(latest).step <= before:
            assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0), "nothing is saved"
            time.sleep(0.01)
        time.sleep(generator.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        amid += any(folder.glob("*.partial"))
        latest = find_latest(folder)
        checksums.verify(latest)
        before = read_description(latest).step
        stored = TorchDist(latest)
        names = [name for name in stored.names if not name.startswith("optimizer.")]
        assert len(names) > 50
        for name in ("connector.linear_fc1.weight", "language.embedding.word_embeddings.weight"):
            assert bool((stored.read(name) == before).all()), f"kill {done}: {latest} holds another step's {name}"
    print(f"{kills} kills, {amid} of them amid a save, the last checkpoint is of step {before}")
    return amid


def test_kills_while_saving(small_run, tmp_path):
    assert kill_while_saving(small_run, tmp_path, 4, seed=1) >= 1


@pytest.mark.long
def test_two_hundred_kills_while_saving(small_run, tmp_path):
    assert kill_while_saving(small_run, tmp_path, 200, seed=2) >= 50
