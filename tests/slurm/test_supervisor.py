"""Causes and budgets, from logs as srun writes them; no Slurm is needed."""

import errno
import os
from pathlib import Path

import pytest

from megatron_eagle.cluster import supervisor
from megatron_eagle.cluster.causes import find_cause
from megatron_eagle.cluster.events import attempts, read_events
from megatron_eagle.cluster.supervisor import Budget, begin, end
from megatron_eagle.training.fencing import STARTS, claim
from megatron_eagle.training.run_events import append_event
from megatron_eagle.training.watchdog import ASKED, SUSPENDED

BUDGET = Budget(failures=2, without_progress=3)
KILLED = """\
0: small 3/4 loss 1.0
srun: error: n2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=4.1
srun: error: n1: tasks 0-1: Exited with exit code 1
"""
PEER_FIRST = """\
srun: error: n1: task 0: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=4.1
srun: error: n2: task 2: Terminated
srun: error: n2: task 3: Killed
"""
EXITED_1 = "srun: error: n1: task 0: Exited with exit code 1\n"
CUT = "srun: launch/slurm: _step_signal: Terminating StepId=4.1\n"
LOST = "0: megatron-eagle: process 0 of 4 lost contact with another one in s, step 3, reducing: Connection closed\n"
TRACEBACK_OF_2 = """\
2: Traceback (most recent call last):
1: something of another rank
2:   File "a.py", line 1, in read
2: KeyError: 7
2:\x20
2: The above exception was the direct cause of the following exception:
2:\x20
2: Traceback (most recent call last):
2:   File "a.py", line 3, in read
2: ValueError: shard 7 is short
"""
TRACEBACK_OF_LOSS = """\
0: Traceback (most recent call last):
0:   File "a.py", line 1, in read
0: torch.distributed.DistNetworkError: Connection reset by peer
"""
AWAY = "srun: error: Unable to confirm allocation for job 1: Unable to contact slurm controller (connect failure)\n"
TORCH = "/site-packages/torch/distributed"
HEAD = {rank: f"rank {rank} on n{1 + rank // 2}, process 1\n" for rank in range(4)}


def dump(rank: int, place: str, folder: str = "/a") -> str:
    frames = f'Thread 0x01 (most recent call first):\n  File "{folder}/{place}.py", line 7 in {place}\n'
    return f"{HEAD[rank]}Timeout (0:05:00)!\n{frames}"


@pytest.mark.parametrize(
    ("code", "asked", "log", "stacks", "outcome", "words", "bad"),
    [
        (0, False, "", {}, "complete", "reached its end", ()),
        (0, True, "", {}, "complete", "reached its end", ()),
        (137, False, KILLED, {}, "failed", "rank 3 on node n2: Killed", ("n2",)),
        (137, False, PEER_FIRST, {}, "failed", "rank 3 on node n2: Killed", ()),
        (137, False, KILLED, HEAD, "failed", "rank 3 on node n2: Killed", ("n2",)),
        (85, False, "", {}, "stopped", "asked to stop", ()),
        (137, False, "srun: error: n1: task 0: Exited with exit code 85\n", {}, "stopped", "asked", ()),
        (138, False, "srun: error: n1: task 0: User defined signal 1\n", {}, "stopped", "asked", ()),
        (138, True, "srun: error: n1: task 0: User defined signal 1\n", {}, "stopped", "asked", ()),
        (2, False, "0: megatron-eagle: batch=3 packs cannot\n", {}, "refused", "megatron-eagle: batch=3 packs", ()),
        (1, False, "2: OSError: [Errno 28] No space left on device\n", {}, "refused", "the disk is full", ()),
        (4, False, "0: megatron-eagle: bad node n2: its clock\n", {}, "failed", "node n2: its clock", ("n2",)),
        (
            86,
            False,
            "",
            {**HEAD, 0: dump(0, "wait"), 1: dump(1, "wait")},
            "failed",
            "for rank 2 on n2, rank 3",
            ("n2",),
        ),
        (86, False, "", {r: dump(r, "wait" if r else "read") for r in HEAD}, "failed", "rank 0 on n1 at read (rea", ()),
        (86, False, "", {r: dump(r, "wait") for r in HEAD}, "failed", "stacks of all 4 ranks", ()),
        (
            86,
            False,
            "",
            {0: dump(0, "recv", TORCH), 1: dump(1, "read"), 2: dump(2, "wait", TORCH), 3: dump(3, "reduce", TORCH)},
            "failed",
            "hang: the others waited for rank 1 on n1 at read (read.py:7)",
            (),
        ),
        (1, False, "", {}, "failed", "exit code 1", ()),
        # signals that ask for an end come from outside, at whatever moment
        (143, False, "srun: error: n2: tasks 2-3: Terminated\n", {}, "stopped", "asked to stop", ()),
        (143, False, "", {}, "stopped", "asked to stop", ()),
        (143, False, f"srun: error: n1: task 0: Terminated\n{CUT}{EXITED_1}", {}, "stopped", "asked to stop", ()),
        (85, False, f"{EXITED_1}{CUT}srun: error: n2: task 3: Exited with exit code 85\n", {}, "stopped", "asked", ()),
        (1, False, f"0: megatron-eagle: rank 0 {ASKED} (SIGTERM)\n{EXITED_1}", {}, "stopped", "asked", ()),
        (4, True, "0: megatron-eagle: bad node n2: ranks 2, 3 did not answer\n", {}, "stopped", "asked", ()),
        (139, False, f"srun: error: n2: task 3: Segmentation fault\n{CUT}", {}, "failed", "Segmentation", ("n2",)),
        # srun ends the rest with TERM, which is no stop
        (1, False, f"{EXITED_1}{CUT}srun: error: n2: tasks 2-3: Terminated\n", {}, "failed", "exit code 1", ()),
        # the first cause
        (1, False, LOST + TRACEBACK_OF_2 + EXITED_1, {}, "failed", "rank 2: ValueError: shard 7 is short", ()),
        (
            1,
            False,
            f"{LOST}{TRACEBACK_OF_2}{EXITED_1}{CUT}srun: error: n2: tasks 2-3: Exited with exit code 1\n",
            {},
            "failed",
            "rank 2 on node n2: ValueError: shard 7 is short",
            (),
        ),
        (1, False, TRACEBACK_OF_LOSS + EXITED_1, {}, "failed", "rank 0 on node n1: Exited with exit code 1", ()),
        (1, False, LOST + EXITED_1, {}, "failed", "exit code 1; megatron-eagle: process 0 of 4 lost contact", ()),
        (2, False, LOST + "0: megatron-eagle: no such key\n", {}, "refused", "megatron-eagle: no such key", ()),
        (1, False, "1: OSError: [Errno 122] Disk quota exceeded\n", {}, "refused", "the quota is used up: 1: OSE", ()),
        # what is nobody's fault
        (1, False, AWAY, {}, "interrupted", "Slurm did not start the processes: srun: error: Unable", ()),
        (
            1,
            False,
            f"3: megatron-eagle: rank 3 {SUSPENDED} 312 s\n{LOST}{EXITED_1}",
            {},
            "interrupted",
            "rank 3 stood still for 312 s (suspended)",
            (),
        ),
    ],
)
def test_causes(code: int, asked: bool, log: str, stacks: dict, outcome: str, words: str, bad: tuple) -> None:
    finding = find_cause(code, asked, log, stacks)
    assert (finding.outcome, finding.bad_nodes) == (outcome, bad)
    assert words in finding.cause


def test_who_was_silent_at_the_end_counts_even_if_it_woke_up_later() -> None:
    stacks = {rank: dump(rank, "wait") for rank in HEAD}
    stacks[0] += "ranks that wrote no stacks: 00003\n"
    finding = find_cause(86, False, "", stacks)
    assert "waited for rank 3 on n2 " in finding.cause and finding.bad_nodes == ("n2",)
    del stacks[3]  # it ended in good order after all
    finding = find_cause(86, False, "", stacks)
    assert "waited for rank 3 " in finding.cause and finding.bad_nodes == ()


class Run:
    """A stage that is started again and again."""

    def __init__(self, folder: Path, steps: int = 9, patience: int | None = None) -> None:
        self.folder = folder
        append_event(folder, "submitted", stage="s", job="1", steps=steps, processes=4, patience=patience)

    def begin(self) -> str | None:
        verdict = begin(self.folder, "s", job="1", nodes="n[1-2]", log=self.folder / "log", budget=BUDGET)
        self.start = verdict.start
        return None if verdict.action == "go" else verdict.reason

    def end(self, code: int, *, asked: bool = False) -> str:
        files = {"log": self.folder / "log", "stacks": self.folder / "stacks"}
        return end(self.folder, "s", job="1", code=code, asked=asked, budget=BUDGET, **files).action

    def checkpoint(self, step: int, waited: int = 0) -> None:
        folder = self.folder / "checkpoints" / "s"
        (folder / f"step_{step}").mkdir(parents=True)
        (folder / f"step_{step}" / "checkpoint.json").write_text(f'{{"step": {step}, "waited": {waited}}}')
        (folder / "latest").write_text(f"step_{step}")


def test_stops_with_progress_go_on_for_ever(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=10)
    for step in range(1, 10):
        assert run.begin() is None
        run.checkpoint(step)
        assert run.end(85) == "requeue"
    assert [attempt.step_before for attempt in attempts(read_events(tmp_path), "s")] == list(range(9))


def test_a_slow_node_is_left_out_of_the_next_start_and_one_that_reads_slowly_is_not(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=10)
    said = {"stage": "s", "slow": True, "ratio": 1.5}
    for step, excluded in ((1, ("n2",)), (2, ())):
        run.begin()
        if excluded:  # and what was said of an earlier start is no longer asked
            append_event(tmp_path, "straggler", **said, rank=3, node="n2", kind="device", alone=True)
            append_event(tmp_path, "straggler", **said, rank=9, node="n5", kind="reading", alone=False)
        run.checkpoint(step)
        files = {"log": tmp_path / "log", "stacks": tmp_path / "stacks"}
        assert end(tmp_path, "s", job="1", code=85, asked=False, budget=BUDGET, **files).exclude == excluded


def test_stops_without_progress_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    actions = [run.begin() or run.end(85) for _ in range(3)]
    assert actions == ["requeue", "requeue", "stop"]
    assert "3 starts in a row without a new checkpoint" in (run.begin() or "")


def test_failures_with_progress_end_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    actions = []
    for step in range(1, 4):
        assert run.begin() is None
        run.checkpoint(step)
        actions.append(run.end(1))
    assert actions == ["requeue", "requeue", "stop"]


def test_a_start_that_ended_without_a_word_is_noted_by_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert [run.begin() for _ in range(3)] == [None, None, None]
    assert "3 starts in a row" in (run.begin() or "")
    outcomes = [event["outcome"] for event in read_events(tmp_path) if event["event"] == "ended"]
    assert outcomes == ["interrupted"] * 3


def test_a_mistake_is_not_tried_again_and_a_new_submission_starts_afresh(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.begin() is None and run.end(2) == "stop"
    assert run.begin() is not None
    assert Run(tmp_path).begin() is None


def test_a_partial_checkpoint_makes_room(tmp_path: Path) -> None:
    run = Run(tmp_path)
    partial = tmp_path / "checkpoints" / "s" / "step_7.partial"
    partial.mkdir(parents=True)
    assert run.begin() is None and run.end(1) == "requeue"
    assert not partial.exists()


def test_a_start_that_is_no_longer_the_newest_notes_no_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.begin() is None and run.start == 1
    claim(tmp_path, job="2")
    files = {"log": tmp_path / "log", "stacks": tmp_path / "stacks"}
    verdict = end(tmp_path, "s", job="1", code=0, asked=False, budget=BUDGET, start=run.start, **files)
    assert verdict.action == "superseded"
    assert "start 1 of" in verdict.reason and "by start 2: job 2, process" in verdict.reason
    assert [event["event"] for event in read_events(tmp_path)] == ["submitted", "started", "superseded"]
    run.checkpoint(9)
    assert end(tmp_path, "s", job="2", code=0, asked=False, budget=BUDGET, start=2, **files).action == "complete"


@pytest.mark.parametrize("blind", [2, 99])
def test_an_end_looks_again_where_the_disk_does_not_say_who_is_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: int
) -> None:
    run = Run(tmp_path)
    assert run.begin() is None
    run.checkpoint(9)
    looks: list[str] = []
    listdir = os.listdir

    def listed(folder: Path) -> list[str]:
        if Path(folder).name == STARTS and len(looks) < blind:
            looks.append("")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: None)
    files = {"log": tmp_path / "log", "stacks": tmp_path / "stacks"}
    verdict = end(tmp_path, "s", job="1", code=0, asked=False, budget=BUDGET, start=run.start, **files)
    assert verdict.action == ("complete" if blind == 2 else "stop"), verdict
    assert blind == 2 or verdict.reason == f"cannot look for a newer start in {tmp_path}: Input/output error"


def test_an_exit_of_0_before_the_last_step_is_no_end(tmp_path: Path) -> None:
    """What srun gives when it loses a node."""
    run = Run(tmp_path)
    assert run.begin() is None
    run.checkpoint(8)
    assert run.end(0) == "requeue" and "at step 8 of 9" in read_events(tmp_path)[-1]["cause"]
    assert run.begin() is None
    run.checkpoint(9)
    assert run.end(0) == "complete"


@pytest.mark.parametrize("code", [0, 1, 85, 137])
def test_a_stage_at_its_last_step_is_complete_however_its_start_ended(tmp_path: Path, code: int) -> None:
    run = Run(tmp_path)
    assert run.begin() is None
    run.checkpoint(9)
    assert run.end(code, asked=code == 85) == "complete"
    cause = read_events(tmp_path)[-1]["cause"]
    assert cause.startswith("reached its end") and ("after it" in cause) == (code != 0)


def test_a_job_by_hand_may_have_more_steps_than_were_submitted(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=5)
    assert run.begin() is None
    run.checkpoint(7)
    ends = [
        end(
            tmp_path, "s", job=job, code=85, asked=True, log=tmp_path / "log", stacks=tmp_path / "stacks", budget=BUDGET
        )
        for job in ("2", "1")
    ]
    assert [one.action for one in ends] == ["requeue", "complete"]


@pytest.mark.parametrize(("patience", "action"), [(None, "requeue"), (3, "requeue"), (2, "complete")])
def test_patience_counts_as_it_was_submitted(tmp_path: Path, patience: int | None, action: str) -> None:
    run = Run(tmp_path, patience=patience)
    assert run.begin() is None
    run.checkpoint(5, waited=2)
    assert run.end(0) == action


@pytest.mark.parametrize("steps", [9, 0])
def test_a_refusal_and_what_trains_nothing_are_not_complete_by_their_step(tmp_path: Path, steps: int) -> None:
    run = Run(tmp_path, steps=steps)
    assert run.begin() is None
    run.checkpoint(9)
    assert run.end(2 if steps else 1) == ("stop" if steps else "requeue")


def test_what_only_reads_the_run_ends_no_other_start(tmp_path: Path) -> None:
    start = claim(tmp_path)
    verdict = begin(tmp_path, "x", job="3", nodes="n1", log=tmp_path / "log", budget=BUDGET, writes=False)
    assert (verdict.action, verdict.start) == ("go", None)
    start.require_newest()


def test_a_new_start_deletes_what_an_old_one_is_writing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    partial = tmp_path / "checkpoints" / "s" / "step_7.3.partial"
    partial.mkdir(parents=True)
    assert run.begin() is None and not partial.exists()
