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
HEADINGS = ("stage", "job", "state", "step", "saved", "loss", "useful tokens/s", "ETA", "restarts", "GPU-h", "why")

Queue = dict[str, tuple[str, str]]  # what ``slurm.states`` returns


@dataclass(frozen=True)
class StageStatus:
    """One stage. saved: step of its newest checkpoint; restarts: starts after the first since it was submitted.

    gpu_hours: of all its starts; of processes, where there are no GPUs.
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
            self.why,
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
    return rows


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
    """The rows under their headings, columns aligned; the last one is not padded, because reasons are long."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    widths[-1] = 0
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
