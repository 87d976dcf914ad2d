"""The table of a chain, from events and metrics alone (these jobs are in no queue)."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.cli import main
from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.accounting import Usage, usage
from megatron_eagle.cluster.status import read_status, table
from megatron_eagle.errors import UserError
from megatron_eagle.training.run_events import append_event


def step(stage: str, number: int) -> str:
    record = {"stage": stage, "step": number, "steps": 10, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.0}
    counts = {"useful_tokens": 900, "tokens": 1000, "tiles": 4, "seconds": 2.0, "data_wait": 0.1, "sample_digest": "d"}
    return json.dumps(record | counts) + "\n"


def test_the_table_of_a_chain(tmp_path: Path) -> None:
    for stage, job in (("a", "7"), ("b", "8"), ("c", "9")):
        append_event(tmp_path, "submitted", stage=stage, job=job, steps=10, processes=4)
    start = {"job": "7", "nodes": "n1", "step": 0, "log_offset": 0}
    append_event(tmp_path, "started", stage="a", **start)
    append_event(tmp_path, "ended", stage="a", step=10, outcome="complete", cause="last step reached", bad_nodes=[])
    append_event(tmp_path, "started", stage="b", **start)
    for _ in range(2):
        append_event(tmp_path, "ended", stage="b", step=0, outcome="failed", cause="rank 3: Killed", bad_nodes=["n2"])
        append_event(tmp_path, "started", stage="b", **start)
    append_event(tmp_path, "gave_up", stage="b", job="8", cause="3 starts in a row")
    (tmp_path / "metrics.jsonl").write_text(step("a", 10) + step("b", 1) + step("b", 2))
    rows = read_status(tmp_path)
    assert [(row.stage, row.state, row.step, row.restarts, row.why) for row in rows] == [
        ("a", "complete", 10, 0, ""),
        ("b", "gave up", 2, 2, "3 starts in a row"),
        ("c", "cancelled", 0, 0, "b did not reach its end"),
    ]
    assert rows[1].tokens_per_second == 450 and rows[1].seconds_left is None, "it will not go on"
    lines = table(rows).splitlines()
    assert lines[0].startswith("stage  job  state") and "2/10" in lines[2]


def test_the_steps_left_of_a_chain_at_the_speed_that_was_measured(tmp_path: Path, monkeypatch: Any) -> None:
    """Steps of 2 s with 1000 tokens on 4 processes: a token of stage b takes 8 processes half as long."""
    for stage, job, processes, tokens in (("a", "7", 4, 1000), ("b", "8", 8, 3000), ("export", "9", 1, 0)):
        steps = 10 if tokens else 0
        append_event(tmp_path, "submitted", stage=stage, job=job, steps=steps, processes=processes, tokens=tokens)
    monkeypatch.setattr(slurm, "states", lambda jobs, **_: {job: ("PENDING", "Dependency") for job in jobs})
    assert not [line for line in table(read_status(tmp_path)).splitlines() if "steps left" in line]
    (tmp_path / "metrics.jsonl").write_text("".join(step("a", number) for number in range(1, 5)))
    rows = read_status(tmp_path)
    assert [(row.steps_left_s, row.measured_on) for row in rows] == [(12.0, "a"), (30.0, "a"), (None, "")]
    text = table(rows)
    assert text.splitlines()[-1] == "steps left: 42s, measured; b at the tokens a second of a"
    assert "b: Dependency" in text.splitlines()


def test_a_run_that_was_never_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing has been submitted"):
        read_status(tmp_path)


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    append_event(tmp_path, "submitted", stage="a", job="7", steps=10, processes=4)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "sta')
    assert [row.stage for row in read_status(tmp_path)] == ["a"]


def test_watching_ends_with_the_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_event(tmp_path, "submitted", stage="a", job="7", steps=10, processes=4)
    append_event(tmp_path, "started", stage="a", job="7", nodes="n1", step=0, log_offset=0)
    append_event(tmp_path, "ended", stage="a", step=10, outcome="complete", cause="", bad_nodes=[])
    with pytest.raises(SystemExit) as end:
        main(["status", str(tmp_path), "--watch", "--every", "60"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith("stage  job  state") and said.count("complete") == 1, (
        "not a terminal"
    )


def test_the_table_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_event(tmp_path, "submitted", stage="a", job="7", steps=10, processes=4)
    (tmp_path / "events.jsonl").open("a").write("{torn")
    append_event(tmp_path, "cancelled", jobs=["7"])
    (tmp_path / "metrics.jsonl").write_text(step("a", 1).replace("2.5", "null"))
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path), "--json", "--watch"])
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(line, parse_constant=pytest.fail)
    assert shown["notes"] == [f"{tmp_path / 'events.jsonl'}: 1 torn line(s) left out (line 2)"]
    (stage,) = shown["stages"]
    assert (stage["stage"], stage["state"], stage["loss"]) == ("a", "cancelled", None)
    assert stage["gpu_hours"] == {"hours": 0.0, "at_least": False}


def test_hours_of_a_stage() -> None:
    """Two starts of 8 and one of 16 processes; a fourth was interrupted, and for how long it ran nobody knows."""

    def at(hour: int, event: str, **values: object) -> dict:
        return {"time": f"2026-11-26T{hour:02d}:00:00+00:00", "event": event, "stage": "a", **values}

    events = [
        at(0, "submitted", processes=8),
        at(1, "started"),
        at(2, "ended", outcome="failed"),
        at(3, "started") | {"stage": "b"},
        at(3, "started"),
        at(5, "ended", outcome="stopped"),
        at(6, "submitted", processes=16),
        at(7, "started"),
    ]
    now = datetime(2026, 11, 26, 8, 30, tzinfo=UTC)
    assert usage(events, "a", now) == Usage(8 * 1 + 8 * 2 + 16 * 1.5)
    assert str(usage(events, "a", None)) == "24.0+"
    events += [at(9, "ended", outcome="interrupted"), at(9, "started"), at(10, "ended", outcome="complete")]
    assert usage(events, "a", None) == Usage(24 + 16, at_least=True)


def test_an_end_without_a_word_is_said(tmp_path: Path) -> None:
    """The batch script was killed, or could not write any more: nobody noted why."""
    append_event(tmp_path, "submitted", stage="a", job="7", steps=10, processes=4)
    append_event(tmp_path, "started", stage="a", job="7", nodes="n1", step=0, log_offset=0)
    (row,) = read_status(tmp_path)
    assert (row.state, row.why) == ("not in the queue", "ended without a word")


@pytest.mark.parametrize(
    ("queue", "happened", "state", "why"),
    [
        ({"7": ("PENDING", "Dependency")}, [], "pending", "Dependency"),
        ({"7": ("PENDING", "BeginTime")}, ["started", "failed"], "pending", "rank 3: Killed"),
        ({"7": ("RUNNING", "None")}, ["started"], "running", ""),
        ({"7": ("RUNNING", "None")}, ["started", "failed", "gave_up"], "running", "3 starts"),
        (
            {"7": ("RUNNING", "None")},
            ["started", "straggler"],
            "running",
            "slow: rank 3 on n2 (host 1.4 times the median)",
        ),
        ({"7": ("PENDING", "BeginTime")}, ["started", "straggler", "failed"], "pending", "rank 3: Killed"),
        ({}, ["started", "failed", "started", "superseded"], "not in the queue", "by start 2"),
        ({}, ["started", "failed", "cancelled"], "cancelled", "rank 3: Killed"),
        ({}, ["started", "complete", "cancelled"], "complete", ""),
        (None, ["started"], "unknown", "Slurm cannot be asked"),
        (None, ["started", "failed"], "unknown", "rank 3: Killed"),
        (None, ["started", "complete"], "complete", ""),
        (None, ["started", "failed", "gave_up"], "gave up", "3 starts"),
    ],
)
def test_state_and_reason(monkeypatch, tmp_path: Path, queue, happened: list[str], state: str, why: str) -> None:
    def states(jobs: list[str], *, patience: float) -> dict[str, tuple[str, str]]:
        if queue is None:
            raise slurm.CannotAsk("away")
        return queue

    monkeypatch.setattr(slurm, "states", states)
    ended = {"stage": "a", "job": "7", "step": 0, "bad_nodes": []}
    values = {
        "started": {"stage": "a", "job": "7", "nodes": "n1", "step": 0, "log_offset": 0},
        "failed": {**ended, "outcome": "failed", "cause": "rank 3: Killed"},
        "complete": {**ended, "outcome": "complete", "cause": "last step reached"},
        "gave_up": {"stage": "a", "job": "7", "cause": "3 starts"},
        "superseded": {"stage": "a", "job": "7", "cause": "by start 2"},
        "straggler": {"stage": "a", "rank": 3, "node": "n2", "slow": True, "kind": "host", "ratio": 1.4, "alone": True},
        "cancelled": {"jobs": ["7"]},
    }
    append_event(tmp_path, "submitted", stage="a", job="7", steps=10, processes=4)
    for event in happened:
        append_event(tmp_path, "ended" if "outcome" in values[event] else event, **values[event])
    (row,) = read_status(tmp_path)
    assert (row.state, row.why) == (state, why)
