"""Gauges of the newest step, in a file that Prometheus' own parser reads; gone when the stage is over."""

import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_eagle.errors import UserError
from megatron_eagle.training.log import StepRecord, TrainingLog


def record(step: int, **changes: Any) -> StepRecord:
    about: dict[str, Any] = {"stage": "stage1", "steps": 9, "loss": 1.5 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
    counts = {"useful_tokens": 90, "tokens": 100, "tiles": 3, "seconds": 2.0, "data_wait": 0.5}
    return StepRecord(step=step, sample_digest="0" * 16, **about | counts | changes)


def open_log(folder: Path, gauges: Path) -> TrainingLog:
    named: dict[str, Any] = {"stage": "stage1", "total_steps": 9, "tensorboard": False, "wandb_project": None}
    return TrainingLog(folder, **named, resumed_at=0, prometheus_folder=gauges)


def gauges_of(path: Path, step: int) -> dict[str, float]:
    """Once the file is of ``step``."""
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        if path.exists():
            families = text_string_to_metric_families(path.read_text())
            samples = [sample for family in families for sample in family.samples]
            found = {sample.name.removeprefix("megatron_eagle_"): sample.value for sample in samples}
            if found["step"] == step:
                assert {tuple(sample.labels.items()) for sample in samples} == {(("run", "eagle"), ("stage", "stage1"))}
                return found
        time.sleep(0.01)
    raise AssertionError(f"{path} is not of step {step}")


def test_the_file_has_the_newest_step_and_goes_with_the_stage(tmp_path: Path) -> None:
    path, started = tmp_path / "megatron_eagle_eagle.prom", time.time()
    with open_log(tmp_path / "eagle", tmp_path) as log:
        log.step(record(1))
        assert gauges_of(path, 1)["loss"] == 1.5
        log.step(record(2, stragglers=1, scores={"chart/exact": 0.25}))
        found = gauges_of(path, 2)
    assert (found["loss"], found["stragglers"], found["score_chart_exact"]) == (0.75, 1.0, 0.25)
    assert started <= found["time_seconds"] <= time.time() and found["useful_tokens_per_second"] == 45.0
    assert [file.name for file in tmp_path.iterdir()] == ["eagle"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="log.prometheus_folder: .*absent is no folder"):
        open_log(tmp_path / "eagle", tmp_path / "absent")
