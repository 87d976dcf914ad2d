"""Causes and budgets, from logs as srun writes them; no Slurm is needed."""

from pathlib import Path

import pytest

from megatron_eagle.cluster.events import append_event, attempts, read_events
from megatron_eagle.cluster.supervisor import Budget, begin, end, find_cause

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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        append_event(folder, "submitted", stage="s", job="1", steps=9, processes=4)

    def begin(self) -> str | None:
        return begin(self.folder, "s", job="1", nodes="n[1-2]", log=self.folder / "log", budget=BUDGET)

    def end(self, code: int, *, asked: bool = False) -> str:
        files = {"log": self.folder / "log", "stacks": self.folder / "stacks"}
        return end(self.folder, "s", job="1", code=code, asked=asked, budget=BUDGET, **files).action

    def checkpoint(self, step: int) -> None:
        folder = self.folder / "checkpoints" / "s"
        (folder / f"step_{step}").mkdir(parents=True)
        (folder / f"step_{step}" / "checkpoint.json").write_text(f'{{"step": {step}}}')
        (folder / "latest").write_text(f"step_{step}")


def test_stops_with_progress_go_on_for_ever(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in range(1, 10):
        assert run.begin() is None
        run.checkpoint(step)
        assert run.end(85) == "requeue"
    assert [attempt.step_before for attempt in attempts(read_events(tmp_path), "s")] == list(range(9))


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
