"""Saving beside training: when a checkpoint exists, what holds training up, and a disk that is full."""

import json
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import spread_cases
import torch
from small_disk import small_disk

from megatron_eagle.checkpoint import checksums
from megatron_eagle.checkpoint.files import find_latest, read_description
from megatron_eagle.config.layout import Layout
from megatron_eagle.conversion.torch_dist import TorchDist

WEIGHT = "connector.linear_fc1.weight"
FROZEN = "language.embedding.word_embeddings.weight"  # no part of a gradient buffer, which Megatron copies anyway


class Trainer:
    """In a process of a world: an engine whose weights are all one number, and the saver of its stage."""

    def __init__(self, folder: str, keep: int = 2) -> None:
        from megatron_eagle.checkpoint.saver import Saver
        from megatron_eagle.compat.platform import install
        from megatron_eagle.parallel.groups import initialise
        from megatron_eagle.training.engine import build_engine

        platform, layout = install(), Layout(pp=2)
        recipe = spread_cases.make_recipe(layout, ("connector",), {}, {})
        self.groups = initialise(layout, platform, timeout=timedelta(seconds=60))
        self.engine = build_engine(recipe, recipe.stages[0], platform, self.groups)
        self.engine.update()  # Adam has nothing to save before its first step
        self.said: list[str] = []
        self.saver = Saver(Path(folder), self.groups, platform.device, keep=keep, say=self.said.append)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for model in self.engine.models:
                for parameter in model.parameters():
                    parameter.fill_(value)

    def start(self, step: int) -> None:
        from megatron_eagle.checkpoint.files import Description

        self.fill(step)
        description = Description("stage", step, 100, {}, {}, self.groups.dp_size)
        self.saver.start(description, self.engine.state(), b"place" if self.groups.is_reader else None)
        self.fill(-1.0)  # training goes on with other weights


def save_with_a_slow_process(folder: str) -> list[str | None]:
    """Rank 1's disk is slow: (newest checkpoint while it writes, after it, after a second save was waited for)."""
    from megatron_eagle.checkpoint import saver as saving

    trainer, latest = Trainer(folder), []
    free, write = threading.Event(), saving.write

    def write_later(save):
        free.wait(30)
        write(save)

    saving.write = write_later if trainer.groups.rank == 1 else write
    try:
        trainer.start(1)
        for _ in range(5):
            time.sleep(0.02)
            trainer.saver.after_step()
        latest.append(find_latest(Path(folder)))
        waited = trainer.saver.take_stall()
        free.set()
        deadline = time.monotonic() + 30
        while trainer.saver.pending and time.monotonic() < deadline:
            trainer.saver.after_step()
        latest.append(find_latest(Path(folder)))
        trainer.start(2)
        trainer.saver.finish(must=True)
        latest.append(find_latest(Path(folder)))
    finally:
        saving.write = write
    assert 0 < waited < 20 and trainer.saver.take_stall() > 0 and trainer.saver.take_stall() == 0
    assert len(trainer.said) == 2 and "stage saved" in trainer.said[0]
    return [path.name if path else None for path in latest]


def test_a_checkpoint_exists_when_all_processes_have_written(worlds, tmp_path):
    for latest in worlds(2).run(save_with_a_slow_process, str(tmp_path)):
        assert latest == [None, "step_00000001", "step_00000002"]
    for step in (1, 2):
        folder = tmp_path / f"step_{step:08d}"
        checksums.verify(folder)
        for name in (WEIGHT, FROZEN):
            assert bool((TorchDist(folder).read(name) == step).all()), f"{name} is not what was copied"
        assert len(json.loads((folder / checksums.CHECKSUMS).read_text())) == len(list(folder.iterdir())) - 1


def save_to_a_full_disk(folder: str, filler: str) -> list[str]:
    """What is said over five saves; the disk is full during the second, the fourth and the fifth."""
    from megatron_eagle.checkpoint.saver import SaveFailed

    trainer = Trainer(folder, keep=1)
    for step in (1, 2, 3, 4, 5):
        if trainer.groups.rank == 0:
            Path(filler).unlink(missing_ok=True)
            if step in (2, 4, 5):
                fill_disk(Path(filler), spare=60_000)
        torch.distributed.barrier()
        try:
            trainer.start(step)
            trainer.saver.finish()
        except SaveFailed as failure:
            trainer.said.append(f"raised: {failure}")
    return trainer.said


def fill_disk(file: Path, spare: int) -> None:
    with file.open("wb") as handle:
        handle.write(bytes(shutil.disk_usage(file.parent).free - spare))


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=16) as folder:
        yield folder


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(worlds, disk):
    stage = disk / "stage"
    for said in worlds(2).run(save_to_a_full_disk, str(stage), str(disk / "filler")):
        saved = [line for line in said if "stage saved" in line]
        assert len(said) == 5 and [line.split()[2][-1] for line in saved] == ["1", "3"]
        for number, step in ((1, 2), (3, 4), (4, 5)):
            name = rf"cannot write {stage}/step_0000000{step}.partial"
            assert name in said[number] and "No space left on device" in said[number]
            free = int(said[number].split("(")[1].split(" bytes free")[0].replace(",", ""))
            assert 0 <= free <= 60_000
        assert all(said[number].endswith("training goes on, the next save tries again") for number in (1, 3))
        assert said[4].startswith("raised: cannot write")
    assert [path.name for path in sorted(stage.iterdir())] == ["latest", "step_00000003"]
    latest = find_latest(stage)
    checksums.verify(latest)
    assert read_description(latest).step == 3 and bool((TorchDist(latest).read(WEIGHT) == 3).all())
