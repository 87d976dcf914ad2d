"""Judges each start of a stage's job: why it ended, and whether another one would help.

The batch script does what only Slurm's commands can (requeue, exclude a node); it asks here what to do. Rules:

- the last step was reached: the chain goes on;
- asked to stop (time limit, preemption), or ended from outside (a dead node): again, while it comes forward;
- failed (a rank died, a hang, a bad node): again, within the budget of failures;
- superseded by a newer start of the run: nothing, it is the newer one's business;
- refused (a mistake in the recipe, a full disk, a loss that is no number): not again, a restart cannot mend it.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.cluster.causes import Finding, find_cause
from megatron_eagle.cluster.events import (
    FULL_DISK_BYTES,
    Attempt,
    attempts,
    is_over,
    newest_step,
    read_events,
    slow_nodes,
)
from megatron_eagle.errors import Superseded
from megatron_eagle.training.fencing import Start, claim
from megatron_eagle.training.run_events import append_event

_LOOK_AGAIN = (2.0, 5.0, 10.0, 20.0, 20.0)  # seconds before each further look for a newer start


@dataclass(frozen=True)
class Budget:
    """``profile.Restarts`` explains both."""

    failures: int
    without_progress: int


@dataclass(frozen=True)
class Verdict:
    """What the batch script is to do, and why.

    action: ``go`` or ``stop`` before a start; after it ``complete``, ``requeue``, ``stop`` or ``superseded``. exclude:
    nodes to leave out. start: number of the start that begins.
    """

    action: str
    reason: str
    exclude: tuple[str, ...] = ()
    start: int | None = None


def begin(
    run_folder: Path, stage: str, *, job: str, nodes: str, log: Path, budget: Budget, writes: bool = True
) -> Verdict:
    """Note that a start begins, as the newest of the run: ``go`` with its number, or ``stop``.

    writes: whether the job trains; one that only reads the run takes no number.
    """
    before = attempts(read_events(run_folder), stage)
    if before and before[-1].outcome is None:
        cause = "ended from outside without a word: a lost node, a requeue, a preemption, or a kill"
        _note_end(run_folder, stage, job, Finding("interrupted", cause))
        before = attempts(read_events(run_folder), stage)
    reason = why_not_again(before, budget)
    if reason is not None:
        append_event(run_folder, "gave_up", stage=stage, job=job, cause=reason)
        return Verdict("stop", reason)
    number = None
    if writes:  # from here on, what may be left of the start before writes no more
        number = claim(run_folder, job=job, nodes=nodes).number
        _drop_partial_checkpoints(run_folder, stage)
    offset = log.stat().st_size if log.exists() else 0
    step = newest_step(run_folder, stage)
    append_event(run_folder, "started", stage=stage, job=job, nodes=nodes, step=step, log_offset=offset)
    return Verdict("go", "", start=number)


def end(
    run_folder: Path,
    stage: str,
    *,
    job: str,
    code: int,
    asked: bool,
    log: Path,
    stacks: Path,
    budget: Budget,
    start: int | None = None,
) -> Verdict:
    """Note that a start ended with exit ``code`` of its srun, and say what to do.

    asked: the batch script had passed on a signal to stop. start: what ``begin`` said; a start that is no longer the
    newest notes nothing, because what follows is the newer one's business.
    """
    if start is not None:
        try:
            _require_newest(Start(run_folder, start))
        except Superseded as superseded:
            with suppress(OSError):
                append_event(run_folder, "superseded", stage=stage, job=job, cause=str(superseded))
            return Verdict("superseded", str(superseded))
        except OSError as error:  # to start again might be to train beside a newer one
            return Verdict("stop", f"cannot look for a newer start in {run_folder}: {error.strerror}")
    last = attempts(read_events(run_folder), stage)
    offset = last[-1].log_offset if last else 0
    finding = find_cause(code, asked, _tail(log, offset), _stacks(stacks))
    finding = _against_checkpoints(finding, run_folder, stage, job)
    free = shutil.disk_usage(run_folder).free
    if code and free < FULL_DISK_BYTES:  # then srun's messages could not be written to the log, either
        finding = Finding("refused", f"the disk is full: {free / 1e6:.1f} MB free for {run_folder}")
    _drop_partial_checkpoints(run_folder, stage)
    try:
        _note_end(run_folder, stage, job, finding)
    except OSError as error:  # without its history no start can be counted, and so none may follow
        return Verdict("stop", f"{finding.cause}; cannot write {run_folder}: {error.strerror}")
    if finding.outcome == "complete":
        return Verdict("complete", finding.cause)
    reason = why_not_again(attempts(read_events(run_folder), stage), budget)
    if reason is not None:
        append_event(run_folder, "gave_up", stage=stage, job=job, cause=reason)
        return Verdict("stop", reason)
    slow = slow_nodes(read_events(run_folder), stage)
    return Verdict("requeue", finding.cause, tuple(dict.fromkeys((*finding.bad_nodes, *slow))))


def why_not_again(made: Sequence[Attempt], budget: Budget) -> str | None:
    """The reason not to start the stage again after these attempts, None if it may."""
    if not made:
        return None
    last = made[-1]
    if last.outcome == "refused":
        return last.cause
    failures = sum(attempt.outcome == "failed" for attempt in made)
    if failures > budget.failures:
        return f"{failures} failures, {budget.failures} restarts after failures are allowed; last: {last.cause}"
    idle = 0
    for attempt in reversed(made):
        if attempt.progressed:
            break
        idle += 1
    if idle >= budget.without_progress:
        return (
            f"{idle} starts in a row without a new checkpoint (still at step {last.step_after}), "
            f"{budget.without_progress} are allowed; last: {last.cause}"
        )
    return None


def _require_newest(start: Start) -> None:
    """``start.require_newest``, again for a minute where the disk does not say: network file systems come back."""
    for pause in _LOOK_AGAIN:
        try:
            return start.require_newest()
        except OSError:
            time.sleep(pause)
    start.require_newest()


def _against_checkpoints(finding: Finding, run_folder: Path, stage: str, job: str) -> Finding:
    """Of a stage that trains its last checkpoint says whether it is complete, whatever its processes said.

    A srun that lost a node ends with 0; and a process may be stopped, or hang, after its last step. A job that
    is not the one submitted last, as one by hand, may be given other steps: that it was stopped is then no end.
    """
    submitted = [e for e in read_events(run_folder) if e["event"] == "submitted" and e["stage"] == stage and e["steps"]]
    if not submitted or finding.outcome == "refused":
        return finding
    steps, patience = submitted[-1]["steps"], submitted[-1].get("patience")
    if is_over(run_folder, stage, steps, patience):
        if finding.outcome == "complete" or submitted[-1]["job"] != job:
            return finding
        return Finding("complete", f"reached its end; after it {finding.cause}")
    if finding.outcome == "complete":
        step = newest_step(run_folder, stage)
        return Finding("interrupted", f"ended without an error at step {step} of {steps}, as when a node is lost")
    return finding


def _note_end(run_folder: Path, stage: str, job: str, finding: Finding) -> None:
    step = newest_step(run_folder, stage)
    append_event(
        run_folder,
        "ended",
        stage=stage,
        job=job,
        step=step,
        outcome=finding.outcome,
        cause=finding.cause,
        bad_nodes=list(finding.bad_nodes),
    )


def _drop_partial_checkpoints(run_folder: Path, stage: str) -> None:
    """Nobody writes them any more, and on a full disk they are what the events need room from."""
    for leftover in (run_folder / "checkpoints" / stage).glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _tail(log: Path, offset: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(offset)
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _stacks(folder: Path) -> dict[int, str]:
    return {
        int(file.stem.removeprefix("rank_")): file.read_text(encoding="utf-8", errors="replace")
        for file in folder.glob("rank_*.txt")
    }
