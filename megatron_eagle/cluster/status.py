"""The chain of a run as a table: where each stage is, how fast, how often it was started again and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.events import attempts, newest_step, read_events
from megatron_eagle.errors import UserError
from megatron_eagle.training.log import (
    ETA_WINDOW,
    METRICS_FILE,
    StepRecord,
    format_duration,
    read_metrics,
    remaining_seconds,
)

HEADINGS = ("stage", "job", "state", "step", "saved", "loss", "useful tokens/s", "ETA", "restarts", "why")


@dataclass(frozen=True)
class Row:
    """One stage. saved: step of its newest checkpoint; restarts: starts after the first since it was submitted."""

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
            self.why,
        )


def read_status(run_folder: Path) -> list[Row]:
    """One row per job of the chain last submitted; UserError if none ever was."""
    events = read_events(run_folder)
    submitted = {event["stage"]: event for event in events if event["event"] == "submitted"}
    if not submitted:
        raise UserError(f"nothing has been submitted in {run_folder} (no events.jsonl with a 'submitted' line)")
    try:
        queue = slurm.states([event["job"] for event in submitted.values()])
    except UserError:  # no Slurm to be asked from here: the files still say most
        queue = {}
    records = read_metrics(run_folder) if (run_folder / METRICS_FILE).is_file() else {}
    return [
        _row(run_folder, event, events, queue.get(event["job"]), records.get(stage, []))
        for stage, event in submitted.items()
    ]


def _row(
    run_folder: Path,
    submitted: dict[str, Any],
    events: Sequence[dict[str, Any]],
    queued: tuple[str, str] | None,
    records: Sequence[StepRecord],
) -> Row:
    stage, steps = submitted["stage"], submitted["steps"]
    made = attempts(events, stage)
    step = records[-1].step if records else 0
    recent = [record.seconds for record in records[-ETA_WINDOW:]]
    ended = [attempt for attempt in made if attempt.outcome is not None]
    gave_up = [e["cause"] for e in events if e["event"] == "gave_up" and e["job"] == submitted["job"]]
    if queued:
        state, why = queued[0].lower(), queued[1] if queued[0] == "PENDING" and not ended else ""
    else:
        state, why = ("complete", "") if ended and ended[-1].outcome == "complete" else ("not in the queue", "")
    if gave_up:
        state = "gave up" if not queued else state
    why = (gave_up[-1] if gave_up else "") or (ended[-1].cause if ended and state != "complete" else "") or why
    return Row(
        stage=stage,
        job=submitted["job"],
        state=state,
        step=step,
        steps=steps,
        saved=newest_step(run_folder, stage),
        loss=records[-1].loss if records else None,
        tokens_per_second=records[-1].useful_tokens_per_second if records else None,
        seconds_left=remaining_seconds(recent, steps - step) if records and steps > step else None,
        restarts=max(0, len(made) - 1),
        why=why,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows under their headings, columns aligned; the last one is not padded, because reasons are long."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    widths[-1] = 0
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
