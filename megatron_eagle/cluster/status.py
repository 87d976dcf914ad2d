"""The chain of a run as a table: where each stage is, how fast, how often it was started again and why."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.accounting import Usage, usage
from megatron_eagle.cluster.events import FULL_DISK_BYTES, attempts, newest_step, read_events
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
    stage, steps = submitted["stage"], submitted["steps"]
    queued = (queue or {}).get(submitted["job"])
    made = attempts(events, stage)
    step = records[-1].step if records else 0
    recent = [record.seconds for record in records[-ETA_WINDOW:]]
    ended = [attempt for attempt in made if attempt.outcome is not None]
    gave_up = [e["cause"] for e in events if e["event"] == "gave_up" and e["job"] == submitted["job"]]
    if queued:
        state, why = queued[0].lower(), queued[1] if queued[0] == "PENDING" and not ended else ""
    else:
        absent = UNKNOWN if queue is None else GONE
        state, why = (COMPLETE if ended and ended[-1].outcome == "complete" else absent), ""
    if state == GONE and any(submitted["job"] in e["jobs"] for e in events if e["event"] == "cancelled"):
        state = CANCELLED
    if gave_up and not queued:
        state = GAVE_UP
    failures = [attempt.cause for attempt in ended if attempt.outcome != "complete"]
    why = (gave_up[-1] if gave_up else "") or (failures[-1] if failures else "") or why
    if state == UNKNOWN and not why:
        why = "Slurm cannot be asked"
    if state == GONE and made and made[-1].outcome is None:
        free = shutil.disk_usage(run_folder).free
        why = "ended without a word" + (
            f": only {free / 1e6:.1f} MB are free in {run_folder}" * (free < FULL_DISK_BYTES)
        )
        superseded = [e["cause"] for e in events if e["event"] == "superseded" and e["job"] == submitted["job"]]
        why = superseded[-1] if superseded else why
    return StageStatus(
        stage=stage,
        job=submitted["job"],
        state=state,
        step=step,
        steps=steps,
        saved=newest_step(run_folder, stage),
        loss=records[-1].loss if records else None,
        tokens_per_second=records[-1].useful_tokens_per_second if records else None,
        seconds_left=remaining_seconds(recent, steps - step) if queued and records and steps > step else None,
        restarts=max(0, len(made) - 1),
        gpu_hours=usage(events, stage, datetime.now(UTC) if queued and queued[0] == "RUNNING" else None),
        why=why,
    )


def table(rows: Sequence[StageStatus]) -> str:
    """The rows under their headings, columns aligned; the last one is not padded, because reasons are long."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    widths[-1] = 0
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
