"""The chain of a run as a table: where each stage is, how fast, how often it was started again and why."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.accounting import Usage, usage
from megatron_eagle.cluster.events import FULL_DISK_BYTES, Attempt, attempts, newest_step, read_events, stragglers
from megatron_eagle.errors import UserError
from megatron_eagle.text import folded, stacked
from megatron_eagle.training.json_lines import warn
from megatron_eagle.training.log import (
    ETA_WINDOW,
    METRICS_FILE,
    StepRecord,
    format_duration,
    read_metrics,
    remaining_seconds,
)

GONE, GAVE_UP, CANCELLED, COMPLETE = "not in the queue", "gave up", "cancelled", "complete"
UNKNOWN = "unknown"  # Slurm cannot be asked
OVER = (GONE, GAVE_UP, CANCELLED, COMPLETE)  # states of a job that will not change any more
HEADINGS = ("stage", "job", "state", "step", "saved", "loss", "tokens/s", "ETA", "restarts", "GPU-h")

Queue = dict[str, tuple[str, str]]  # what ``slurm.states`` returns


@dataclass(frozen=True)
class StageStatus:
    """One stage. saved: step of its newest checkpoint; restarts: starts after the first since it was submitted.

    gpu_hours: of all its starts; of processes, where there are no GPUs. steps_left_s: seconds of the steps that it has
    yet to take, at the speed of the stage ``measured_on``: its own, or that before it; None where no step was measured.
    """

    stage: str
    job: str
    state: str
    step: int
    steps: int
    saved: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    restarts: int
    gpu_hours: Usage
    why: str
    steps_left_s: float | None = None
    measured_on: str = ""

    def cells(self) -> tuple[str, ...]:
        return (
            self.stage,
            self.job,
            self.state,
            f"{self.step}/{self.steps}" if self.steps else "",
            str(self.saved) if self.steps else "",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
            "" if self.seconds_left is None else format_duration(self.seconds_left),
            str(self.restarts),
            str(self.gpu_hours),
        )


def read_status(run_folder: Path, say: Callable[[str], None] = warn, *, patience: float = 20.0) -> list[StageStatus]:
    """One row per job of the chain last submitted; UserError if none ever was.

    say: is told of torn lines. patience: seconds for which a Slurm that does not answer is asked again; then the run's
    files say what they can.
    """
    events = read_events(run_folder, say)
    submitted = {event["stage"]: event for event in events if event["event"] == "submitted"}
    if not submitted:
        raise UserError(f"nothing has been submitted in {run_folder} (no events.jsonl with a 'submitted' line)")
    try:
        queue: Queue | None = slurm.states([event["job"] for event in submitted.values()], patience=patience)
    except slurm.CannotAsk:
        queue = None
    except UserError:  # no Slurm to be asked from here: the files still say most
        queue = {}
    records = read_metrics(run_folder, say) if (run_folder / METRICS_FILE).is_file() else {}
    rows: list[StageStatus] = []
    for stage, event in submitted.items():
        row = _row(run_folder, event, events, queue, records.get(stage, []))
        if rows and row.state == GONE and not row.step and rows[-1].state in (GAVE_UP, CANCELLED):
            row = replace(row, state=CANCELLED, why=f"{rows[-1].stage} did not reach its end")
        rows.append(row)
    return _with_steps_left(rows, submitted, records)


def _with_steps_left(
    rows: Sequence[StageStatus], submitted: Mapping[str, Mapping[str, Any]], records: Mapping[str, Sequence[StepRecord]]
) -> list[StageStatus]:
    """Each row with its steps left in seconds; in a stage not begun a token takes a process as long as in the last."""
    found, before = [], None
    for row in rows:
        event, own = submitted[row.stage], records.get(row.stage)
        left, tokens = max(0, row.steps - row.step), event.get("tokens")
        if own:
            recent = own[-ETA_WINDOW:]
            row = replace(row, steps_left_s=remaining_seconds([one.seconds for one in recent], left))
            pace = sum(one.seconds for one in recent) / sum(one.tokens for one in recent) * event["processes"]
            before = (row.stage, pace)
            row = replace(row, measured_on=row.stage)
        elif before and tokens:
            seconds = left * tokens * before[1] / event["processes"]
            row = replace(row, steps_left_s=seconds, measured_on=before[0])
        found.append(row)
    return found


def _row(
    run_folder: Path,
    submitted: dict[str, Any],
    events: Sequence[dict[str, Any]],
    queue: Queue | None,
    records: Sequence[StepRecord],
) -> StageStatus:
    stage, job, steps = submitted["stage"], submitted["job"], submitted["steps"]
    queued = (queue or {}).get(job)
    made = attempts(events, stage)
    causes = {event["event"]: event["cause"] for event in events if event.get("job") == job and "cause" in event}
    cancelled = any(job in event["jobs"] for event in events if event["event"] == "cancelled")
    state = _state(queued, made, gave_up="gave_up" in causes, cancelled=cancelled, asked=queue is not None)
    last = records[-1] if records else None
    left = steps - last.step if last else 0
    slow = _slow(events, stage) if queued and queued[0] == "RUNNING" else ""
    recent = [record.seconds for record in records[-ETA_WINDOW:]]
    return StageStatus(
        stage=stage,
        job=job,
        state=state,
        step=last.step if last else 0,
        steps=steps,
        saved=newest_step(run_folder, stage),
        loss=last.loss if last else None,
        tokens_per_second=last.useful_tokens_per_second if last else None,
        seconds_left=remaining_seconds(recent, left) if queued and left > 0 else None,
        restarts=max(0, len(made) - 1),
        gpu_hours=usage(events, stage, datetime.now(UTC) if queued and queued[0] == "RUNNING" else None),
        why="; ".join(filter(None, (_why(run_folder, state, queued, made, causes), slow))),
    )


def _state(
    queued: tuple[str, str] | None, made: Sequence[Attempt], *, gave_up: bool, cancelled: bool, asked: bool
) -> str:
    """Slurm's word for a job in its queue, otherwise what the run's files say. asked: whether Slurm could be."""
    if queued:
        return queued[0].lower()
    if gave_up:
        return GAVE_UP
    outcomes = [attempt.outcome for attempt in made if attempt.outcome is not None]
    if outcomes and outcomes[-1] == "complete":
        return COMPLETE
    if not asked:
        return UNKNOWN
    return CANCELLED if cancelled else GONE


def _why(
    run_folder: Path,
    state: str,
    queued: tuple[str, str] | None,
    made: Sequence[Attempt],
    causes: Mapping[str, str],
) -> str:
    """What ended the last start that did not reach its end, or what the job waits for.

    causes: of the job's newest event of each kind.
    """
    if state == GONE and made and made[-1].outcome is None:
        return causes.get("superseded") or _without_a_word(run_folder)
    ended = [attempt for attempt in made if attempt.outcome is not None]
    failures = [attempt.cause for attempt in ended if attempt.outcome != "complete"]
    known = causes.get("gave_up") or (failures[-1] if failures else "")
    if known or state == UNKNOWN:
        return known or "Slurm cannot be asked"
    return queued[1] if queued and queued[0] == "PENDING" and not ended else ""


def _slow(events: Sequence[dict[str, Any]], stage: str) -> str:
    """The processes that the others wait for, as the trainer named them; the first three by name."""
    found = stragglers(events, stage)
    said = [f"rank {one['rank']} on {one['node']} ({one['kind']} {one['ratio']} times the median)" for one in found[:3]]
    return f"slow: {', '.join(said)}" + f" and {len(found) - 3} more" * (len(found) > 3) if found else ""


def _without_a_word(run_folder: Path) -> str:
    free = shutil.disk_usage(run_folder).free
    return "ended without a word" + f": only {free / 1e6:.1f} MB are free in {run_folder}" * (free < FULL_DISK_BYTES)


def table(rows: Sequence[StageStatus]) -> str:
    """The rows under their headings, what ended or holds each stage, and how long the steps of the chain take."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = [
        "  ".join(line[column].ljust(widths[column]) for column in part).rstrip()
        for part in stacked(HEADINGS, lines[1:], borders=2, keep=1)
        for line in lines
    ]
    text += [folded(f"{row.stage}: {row.why}") for row in rows if row.why]
    return "\n".join([*text, *chain_left(rows)])


def chain_left(rows: Sequence[StageStatus]) -> list[str]:
    """A line with the seconds of all steps left, without the time in queues; none of a chain that is over."""
    waiting = [row for row in rows if row.steps and row.state not in OVER]
    known = [row.steps_left_s for row in waiting if row.steps_left_s is not None]
    if not waiting or len(known) < len(waiting):
        return []
    guessed = [f"{row.stage} at the tokens a second of {row.measured_on}" for row in waiting if row.step == 0]
    line = f"steps left: {format_duration(sum(known))}, measured" + "".join(f"; {one}" for one in guessed)
    return [folded(line)]
