"""The training log: what is printed, what is stored, and what a resumed run leaves behind."""

import json
import math
import sys
import types
from datetime import datetime
from pathlib import Path

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.progress import quiet, verbose
from megatron_eagle.training.log import (
    StepRecord,
    TrainingLog,
    format_duration,
    progress_line,
    read_metrics,
    remaining_seconds,
    sample_digest,
)


def record(step: int, *, stage: str = "stage1", steps: int = 20, **changes) -> StepRecord:
    values = {
        "loss": 5.0 / max(step, 1),
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "useful_tokens": 1800,
        "tokens": 2000,
        "tiles": 24,
        "seconds": 0.5,
        "data_wait": 0.05,
        "sample_digest": sample_digest([f"s{step}"]),
    }
    return StepRecord(stage=stage, step=step, steps=steps, **{**values, **changes})


def open_log(folder: Path, *, stage: str = "stage1", resumed_at: int = 0, steps: int = 20, **changes) -> TrainingLog:
    options = {"tensorboard": False, "wandb_project": None, **changes}
    return TrainingLog(folder, stage=stage, total_steps=steps, resumed_at=resumed_at, **options)


def write_steps(folder: Path, steps: range, **options) -> None:
    with open_log(folder, **options) as log:
        for step in steps:
            log.step(record(step, stage=options.get("stage", "stage1")))


def stored_steps(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["stage"], entry["step"]) for entry in map(json.loads, lines)]


def test_the_progress_line_holds_every_number_a_reader_looks_for():
    line = progress_line(record(7, loss=2.34567, learning_rate=2e-4, grad_norm=1.25), seconds_left=192)
    for part in (
        "stage1  7/20",
        "loss  2.3457",
        "lr 2.00e-04",
        "grad norm    1.250",
        "3,600 useful tokens/s",  # 1800 tokens in 0.5 s
        "padding 10.0 %",  # 200 of 2000
        "24 tiles",
        "data wait  10 %",
        "ETA 3m12s",
    ):
        assert part in line
    assert "\r" not in line and max(map(len, line.splitlines())) <= 80


def test_the_progress_line_says_how_well_the_machine_is_used():
    gpu = progress_line(record(7, tflops=412.34, mfu=0.4169, checkpoint_stall_s=2.5), seconds_left=1)
    assert " 412.3 TFLOP/s a rank" in gpu and "MFU 41.7 %" in gpu and "checkpoint stall 2.5 s" in gpu
    cpu = progress_line(record(7, tflops=0.0123), seconds_left=1)
    assert "12.3 GFLOP/s a rank" in cpu and "MFU" not in cpu and "stall" not in cpu
    assert record(7, tflops=1.5, mfu=0.2, checkpoint_stall_s=2.5).scalars().items() >= {
        ("tflops", 1.5),
        ("mfu", 0.2),
        ("checkpoint_stall_s", 2.5),
    }


def test_a_step_is_one_line_of_a_terminal_unless_all_is_wanted(tmp_path, capsys):
    numbers = {"grad_norm": 12.345, "tflops": 412.3, "mfu": 0.4, "useful_tokens": 900_000, "tokens": 1_000_000}
    for wanted in (False, True):
        with verbose(wanted), open_log(tmp_path / str(wanted), steps=12000) as log:
            log.step(record(11999, steps=12000, **numbers))
    short, *long = capsys.readouterr().out.splitlines()
    assert len(short) <= 80 and "1,800k tokens/s" in short and "norm   12.345" in short and "ETA" in short
    assert len(long) == 3 and max(map(len, long)) <= 80 and "MFU 40.0 %" in "".join(long)
    assert len(progress_line(record(11999, steps=12000, **numbers), 93899, everything=False)) <= 80
    scored = progress_line(record(3, scores={"heldout": 0.5}, evaluation_s=2.0), 1, everything=False)
    assert "heldout 50.0 %" in scored


def test_lines_of_a_stage_line_up():
    early = progress_line(record(1, steps=400, loss=11.9), 10)
    late = progress_line(record(399, steps=400, loss=0.013), 10)
    assert [early.index(word) for word in ("loss", "grad", "padding", "ETA")] == [
        late.index(word) for word in ("loss", "grad", "padding", "ETA")
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (3599.7, "1h00m"), (93899, "26h05m")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_eta_ignores_single_slow_steps_but_averages_the_usual_ones():
    usual = [1.0, 3.0] * 8
    assert remaining_seconds(usual, 10) == pytest.approx(20)
    assert remaining_seconds([*usual, 500.0], 10) == pytest.approx(20, rel=0.15)
    assert remaining_seconds([4.0], 3) == 12
    assert remaining_seconds([4.0], 0) == 0


def test_rejected_samples_are_named_and_counted_on_lines_of_their_own(tmp_path, capsys):
    rejected = [("chart-12", "truncated image:\n  57 bytes missing"), ("ocr-3", "lost file caf\udce9.jpg")]
    with open_log(tmp_path) as log:
        log.step(record(3, rejected_total=5, rejected=rejected))
    first, second, progress = capsys.readouterr().out.splitlines()
    assert first == "stage1 skipped sample 'chart-12': truncated image: 57 bytes missing (4 so far)"
    assert second.startswith("stage1 skipped sample 'ocr-3': lost file caf") and second.endswith("(5 so far)")
    assert progress.startswith("stage1  3/20")
    assert read_metrics(tmp_path)["stage1"][0].rejected == rejected


def test_metrics_survive_the_file_exactly_and_carry_an_iso_time(tmp_path):
    written = record(1, loss=0.1 + 0.2, grad_norm=1e-17, rejected_total=1, rejected=[("a\u2028b", "r")])
    with open_log(tmp_path) as log:
        log.step(written)
        entry = json.loads((tmp_path / "metrics.jsonl").read_text())  # before close: each line is flushed
    assert read_metrics(tmp_path) == {"stage1": [written]}
    assert datetime.fromisoformat(entry["time"]).utcoffset().total_seconds() == 0


def test_a_loss_that_is_not_a_number_leaves_valid_json(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.step(record(1, loss=math.nan, grad_norm=math.inf))
    entry = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert entry["loss"] is None and entry["grad_norm"] is None
    assert math.isnan(read_metrics(tmp_path)["stage1"][0].loss)
    assert "nan" in capsys.readouterr().out


def test_resuming_drops_the_steps_after_the_checkpoint_and_no_others(tmp_path):
    write_steps(tmp_path, range(1, 4), stage="stage1")
    write_steps(tmp_path, range(1, 8), stage="stage1.5")
    write_steps(tmp_path, range(6, 9), stage="stage1.5", resumed_at=5)
    assert stored_steps(tmp_path) == [("stage1", s) for s in (1, 2, 3)] + [("stage1.5", s) for s in range(1, 9)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_starting_a_stage_again_drops_all_its_steps(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3))
    assert stored_steps(tmp_path) == [("stage1", 1), ("stage1", 2)]


@pytest.mark.parametrize("torn", ['{"stage": "stage1", "st', '{"stage": "stage1"', "\x00\x00"])
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn):
    write_steps(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert len(read_metrics(tmp_path)["stage1"]) == 3
    write_steps(tmp_path, range(4, 6), resumed_at=3)
    assert stored_steps(tmp_path) == [("stage1", s) for s in range(1, 6)]


def test_a_whole_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, range(4, 5), resumed_at=3)
    assert stored_steps(tmp_path) == [("stage1", s) for s in range(1, 5)]


def test_a_crash_while_dropping_leaves_the_old_file(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, resumed_at=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_file_that_is_not_ours_is_named_with_its_line(tmp_path):
    write_steps(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"hello": 1}\n' + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a step record"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a step record"):
        open_log(tmp_path, resumed_at=1)
    path.write_text('{"stage": "stage1", "step": 1, "loss": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: .*steps"):
        read_metrics(tmp_path)


def test_no_metrics_and_an_unwritable_folder_are_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="nothing has been trained"):
        read_metrics(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        open_log(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 21}, "step 21 is outside 1..20"),
        ({"step": 0}, "step 0 is outside"),
        ({"useful_tokens": 2001}, "2001 useful tokens of 2000"),
        ({"seconds": 0.0}, "0.0 seconds"),
        ({"rejected": [("a", "b")]}, "1 samples rejected in this step, 0 in all"),
    ],
)
def test_impossible_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        record(**{"step": 1, "loss": 1.0, **changes})


def test_a_record_of_another_stage_is_refused(tmp_path):
    with open_log(tmp_path) as log, pytest.raises(ValueError, match="stage2"):
        log.step(record(1, stage="stage2"))


def test_the_digest_names_the_samples_whoever_held_them():
    assert sample_digest(["a", "b"]) == sample_digest(["b", "a"])
    assert len({sample_digest(ids) for ids in (["a", "b"], ["ab"], ["a"], ["a", "a"], ["a,b"], [])}) == 6
    assert len(sample_digest([])) == 16


def test_tensorboard_gets_the_scalars_and_forgets_dropped_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, range(1, 6), tensorboard=True)
    write_steps(tmp_path, range(4, 6), tensorboard=True, resumed_at=3)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "stage1")).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5]
    assert losses[3].value == pytest.approx(5.0 / 4)
    assert events.Scalars("useful_tokens_per_second")[0].value == pytest.approx(3600)


def test_missing_dashboards_are_named_and_close_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="'eagle'.*pip install wandb"):
        open_log(tmp_path, wandb_project="eagle")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="'eagle'.*pip install mlflow-skinny"):
        open_log(tmp_path, mlflow_experiment="eagle")
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_log(tmp_path, tensorboard=True)


def test_wandb_continues_the_same_run_after_a_resume_and_a_new_one_after_a_restart(tmp_path, monkeypatch):
    started, logged, configs = [], [], []

    class Run:
        id = "abc123"
        config = types.SimpleNamespace(update=lambda values, allow_val_change: configs.append(values))

        def define_metric(self, *_, **__): ...

        def log(self, values):
            logged.append(values)

        def finish(self): ...

    def init(**options):
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    write_steps(tmp_path, range(1, 3), wandb_project="eagle")
    write_steps(tmp_path, range(3, 4), wandb_project="eagle", resumed_at=2)
    write_steps(tmp_path, range(1, 2), wandb_project="eagle")
    assert [options["id"] for options in started] == [None, "abc123", None]
    assert {options["project"] for options in started} == {"eagle"}
    assert [values["step"] for values in logged] == [1, 2, 3, 1]
    assert logged[1]["loss"] == 2.5


def test_fewer_lines_are_printed_and_every_step_is_stored(tmp_path, capsys):
    with open_log(tmp_path, every=4) as log:
        for step in range(1, 21):
            log.step(record(step, scores={"heldout": 0.5} if step == 10 else {}))
    printed = [int(line.split("/")[0].split()[1]) for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert printed == [4, 8, 10, 12, 16, 20]
    assert len(stored_steps(tmp_path)) == 20


def test_a_quiet_log_stores_every_step_and_names_what_was_skipped(tmp_path, capsys):
    with quiet(), open_log(tmp_path) as log:
        log.step(record(1, rejected=[("a", "broken")], rejected_total=1))
    assert capsys.readouterr().out == "stage1 skipped sample 'a': broken (1 so far)\n"
    assert stored_steps(tmp_path) == [("stage1", 1)]


def test_mlflow_continues_the_same_run_after_a_resume_and_a_new_one_after_a_restart(tmp_path, monkeypatch):
    """A stand-in with the calls of MlflowClient that are used (mlflow-skinny 3.17 took the same ones)."""
    said = []

    class Client:
        def __getattr__(self, name):
            return lambda *arguments, **named: said.append((name, *arguments, named))

        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id=f"number of {name}")

        def create_run(self, place, run_name):
            said.append(("create_run", place, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(said)}"))

    entities = types.SimpleNamespace(Metric=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client, entities=entities))
    write_steps(tmp_path, range(1, 3), mlflow_experiment="eagle", about={"commit": "abc"})
    write_steps(tmp_path, range(3, 4), mlflow_experiment="eagle", resumed_at=2)
    write_steps(tmp_path, range(1, 2), mlflow_experiment="eagle")
    runs = [entry for entry in said if entry[0] == "create_run"]
    assert runs == [("create_run", "number of eagle", f"{tmp_path.name}-stage1")] * 2
    assert ("update_run", "id1", {"status": "RUNNING"}) in said
    assert ("log_dict", "id1", {"commit": "abc"}, "start-0.json", {}) in said
    batches = [(entry[1], entry[2]["metrics"][0]) for entry in said if entry[0] == "log_batch"]
    assert [(identity, name, step) for identity, (name, _, _, step) in batches][:3] == [
        ("id1", "loss", 1),
        ("id1", "loss", 2),
        ("id1", "loss", 3),
    ]
    assert batches[3][0] != "id1" and [entry[0] for entry in said].count("set_terminated") == 3
