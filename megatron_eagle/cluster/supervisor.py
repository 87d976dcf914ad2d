"""Judges each start of a stage's job: why it ended, and whether another one would help.

The batch script does what only Slurm's commands can (requeue, exclude a node); it asks here what to do. Rules:

- the last step was reached: the chain goes on;
- asked to stop (time limit, preemption), or ended from outside (a dead node): again, while it comes forward;
- failed (a rank died, a hang, a bad node): again, within the budget of failures;
- refused (a mistake in the recipe, a full disk, a loss that is no number): not again, a restart cannot mend it.
"""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.cluster.events import (
    FULL_DISK_BYTES,
    Attempt,
    Outcome,
    append_event,
    attempts,
    newest_step,
    read_events,
)
from megatron_eagle.training.watchdog import (
    HANG_EXIT_CODE,
    NON_FINITE_EXIT_CODE,
    SILENT,
    STACKS_FOLLOW,
    STOPPED_EXIT_CODE,
)

USER_ERROR = 2  # exit code of the command line after a UserError
BAD_NODE = 4  # exit code of ``megatron-eagle doctor``
NO_SPACE = "No space left on device"
WAITING = "torch/distributed/"  # a process whose innermost call is there waits for others
_TASK = re.compile(r"^srun: error: (?P<node>[^:\s]+): tasks? (?P<ranks>[\d,\-]+): (?P<end>.+)$", re.MULTILINE)
_EXITED = re.compile(r"Exited with exit code (\d+)")
_COLLATERAL = re.compile(r"^srun: .*Terminating (StepId|job step)", re.MULTILINE)
_OURS = re.compile(r"^(?:\s*\d+: )?(megatron-eagle: .+)$", re.MULTILINE)
_DOCTOR = re.compile(r"^(?:\s*\d+: )?megatron-eagle: bad node (?P<node>\S+): (?P<why>.+)$", re.MULTILINE)
_SILENT = re.compile(rf"^{SILENT}(.*)$", re.MULTILINE)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')


@dataclass(frozen=True)
class Budget:
    """``profile.Restarts`` explains both."""

    failures: int
    without_progress: int


@dataclass(frozen=True)
class Finding:
    """Why a start ended."""

    outcome: Outcome
    cause: str
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the batch script is to do: ``complete``, ``requeue`` or ``stop``, why, and which nodes to leave out."""

    action: str
    reason: str
    exclude: tuple[str, ...] = ()


def begin(run_folder: Path, stage: str, *, job: str, nodes: str, log: Path, budget: Budget) -> str | None:
    """Note that a start begins; returns why it must not, or None."""
    before = attempts(read_events(run_folder), stage)
    if before and before[-1].outcome is None:
        cause = "ended from outside without a word: a lost node, a requeue, a preemption, or a kill"
        _note_end(run_folder, stage, job, Finding("interrupted", cause))
        before = attempts(read_events(run_folder), stage)
    reason = why_not_again(before, budget)
    if reason is not None:
        append_event(run_folder, "gave_up", stage=stage, job=job, cause=reason)
        return reason
    offset = log.stat().st_size if log.exists() else 0
    step = newest_step(run_folder, stage)
    append_event(run_folder, "started", stage=stage, job=job, nodes=nodes, step=step, log_offset=offset)
    return None


def end(
    run_folder: Path, stage: str, *, job: str, code: int, asked: bool, log: Path, stacks: Path, budget: Budget
) -> Verdict:
    """Note that a start ended with exit ``code`` of its srun, and say what to do.

    asked: the batch script had passed on a signal to stop.
    """
    last = attempts(read_events(run_folder), stage)
    offset = last[-1].log_offset if last else 0
    finding = find_cause(code, asked, _tail(log, offset), _stacks(stacks))
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
    return Verdict("requeue", finding.cause, finding.bad_nodes)


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


def find_cause(code: int, asked: bool, log: str, stacks: dict[int, str]) -> Finding:
    """Why a start ended, from its exit code, its part of the log, and the stacks its processes left.

    stacks: rank -> text of its file; a rank that did not notice a hang has only the heading, "rank 3 on n2, ...".
    """
    if code == 0:
        return Finding("complete", "reached its end")
    full = next((line.strip() for line in log.splitlines() if NO_SPACE in line), None)
    if full is not None:
        return Finding("refused", f"the disk is full: {full[-300:]}")
    doctor = list(dict.fromkeys(_DOCTOR.findall(log)))
    if doctor:
        cause = "; ".join(f"node {node}: {why}" for node, why in doctor)
        return Finding("failed", f"pre-flight: {cause}", tuple(sorted({node for node, _ in doctor})))
    if any(STACKS_FOLLOW in text for text in stacks.values()):
        return _hang(stacks)
    first, killed = _first_task(log), _killed_tasks(log)
    exited = _EXITED.search(first["end"]) if first else None
    code = int(exited.group(1)) if exited else code
    too_early = first is not None and first["end"].startswith("User defined signal 1")  # before it could catch it
    if asked or too_early or code == STOPPED_EXIT_CODE:
        return Finding("stopped", "asked to stop (time limit, preemption or an operator)")
    if code in (USER_ERROR, NON_FINITE_EXIT_CODE):
        said = _OURS.findall(log)
        mistake = f"exit code {code}: a mistake in the recipe or the arguments, or a loss that is no number"
        return Finding("refused", said[-1] if said else mistake)
    if first is None:
        return Finding("failed", f"exit code {code}")
    what = _say(first)
    if code == HANG_EXIT_CODE:
        return Finding("failed", f"hang; {what}")
    if exited and killed:  # peers notice within milliseconds, and may be reported before the one that was killed
        what += f"; {'; '.join(map(_say, killed))}"
    return Finding("failed", what, () if exited else (first["node"],))


def _hang(stacks: dict[int, str]) -> Finding:
    """A process that cannot even write its stacks is the one that the others wait for; or one that stands elsewhere."""
    headings = {rank: text.split("\n", 1)[0].split(",")[0] for rank, text in stacks.items()}
    seen = [line.split() for text in stacks.values() for line in _SILENT.findall(text)]
    silent = {int(rank) for ranks in seen for rank in ranks} or {r for r in stacks if STACKS_FOLLOW not in stacks[r]}
    if silent:
        names = ", ".join(headings.get(rank, f"rank {rank}") for rank in sorted(silent))
        nodes = {headings[rank].rpartition(" on ")[2] for rank in silent if rank in headings}
        cause = f"hang: the others waited for {names} (no stack: stopped, or its node is gone)"
        return Finding("failed", cause, tuple(sorted(nodes)))
    places = {rank: _innermost(text) for rank, text in stacks.items()}
    busy = [rank for rank, place in sorted(places.items()) if WAITING not in place]
    if 0 < len(busy) < len(places) / 2:
        names = ", ".join(f"{headings[rank]} at {places[rank]}" for rank in busy)
        return Finding("failed", f"hang: the others waited for {names}")
    usual, count = Counter(places.values()).most_common(1)[0]
    odd = [rank for rank, place in sorted(places.items()) if place != usual]
    if odd and count > len(places) / 2:
        names = ", ".join(f"{headings[rank]} at {places[rank]}" for rank in odd)
        return Finding("failed", f"hang: {names}, all others at {usual}")
    return Finding("failed", f"hang: no step in time, stacks of all {len(stacks)} ranks are in the job's folder")


def _innermost(stacks: str) -> str:
    """Where the main thread stood: faulthandler writes it last, innermost call first."""
    main = stacks.rpartition("Thread 0x")[2]
    frame = _FRAME.search(main)
    if frame is None:
        return "an unknown place"
    file = frame["file"]
    short = WAITING + Path(file).name if f"/{WAITING}" in file else Path(file).name
    return f"{frame['function']} ({short}:{frame['line']})"


def _say(task: dict[str, str]) -> str:
    return f"rank {task['ranks']} on node {task['node']}: {task['end']}"


def _killed_tasks(log: str) -> list[dict[str, str]]:
    """Tasks ended by a signal; not by SIGTERM, with which srun ends the rest."""
    tasks = (match.groupdict() for match in _TASK.finditer(log))
    return [task for task in tasks if not _EXITED.search(task["end"]) and task["end"] != "Terminated"]


def _first_task(log: str) -> dict[str, str] | None:
    """What srun said of the first task that ended badly; later ones were ended by srun, or by losing the first.

    Of those before srun ended the rest, one that a signal killed comes first: its peers fail within milliseconds, and
    may be reported earlier.
    """
    cut = _COLLATERAL.search(log)
    found = [match.groupdict() for match in _TASK.finditer(log[: cut.start()] if cut else log)]
    found = found or [match.groupdict() for match in _TASK.finditer(log)]
    killed = [task for task in found if not _EXITED.search(task["end"])]
    return next(iter(killed or found), None)


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
