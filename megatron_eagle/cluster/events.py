"""What happened to a run on the cluster: ``events.jsonl`` in its folder, one line an event, only ever appended to.

Jobs of the chain write it (submitted, started, ended), the trainer too (straggler), and everything else is worked out
from it: how often a stage was started, whether it came forward, what ``status`` shows. Nothing heavy is imported,
because it runs beside every start.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_eagle.config import ending
from megatron_eagle.training.json_lines import read_lines, warn
from megatron_eagle.training.run_events import EVENTS_FILE

FULL_DISK_BYTES = 1 << 20  # with less than that free, whatever goes wrong goes wrong for that reason
Outcome = Literal["complete", "stopped", "failed", "refused", "interrupted"]


@dataclass(frozen=True)
class Attempt:
    """One start of a stage's job.

    step_before, step_after: step of the newest checkpoint when it started and ended.
    log_offset: bytes the job's log held when it started; all starts of a job share one log.
    outcome: None while it runs - or when it was ended without a word, as by a dead node.
    """

    stage: str
    job: str
    nodes: str
    step_before: int
    log_offset: int = 0
    step_after: int = 0
    outcome: Outcome | None = None
    cause: str = ""
    bad_nodes: tuple[str, ...] = ()

    @property
    def progressed(self) -> bool:
        return self.step_after > self.step_before


def read_events(run_folder: Path, say: Callable[[str], None] = warn) -> list[dict[str, Any]]:
    """All events; ``say`` is told how many lines were left out, which a crash or a full disk had torn."""
    path = run_folder / EVENTS_FILE
    lines = read_lines(path)
    if lines.torn:
        say(lines.said(path))
    return [entry for _, entry in lines.entries if "event" in entry]


def attempts(events: Sequence[dict[str, Any]], stage: str) -> list[Attempt]:
    """The starts of ``stage`` since it was last submitted, oldest first."""
    made: list[Attempt] = []
    for event in events:
        if event.get("stage") != stage:
            continue
        if event["event"] == "submitted":
            made = []
        elif event["event"] == "started":
            made.append(Attempt(stage, event["job"], event["nodes"], event["step"], event["log_offset"], event["step"]))
        elif event["event"] == "ended" and made:
            begun = made.pop()
            made.append(
                Attempt(
                    stage,
                    begun.job,
                    begun.nodes,
                    begun.step_before,
                    begun.log_offset,
                    event["step"],
                    event["outcome"],
                    event["cause"],
                    tuple(event["bad_nodes"]),
                )
            )
    return made


def stragglers(events: Sequence[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """The newest word on each process of the stage's last start that is slow now, in the order of ranks."""
    last: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("stage") == stage and event["event"] == "started":
            last = {}
        elif event.get("stage") == stage and event["event"] == "straggler":
            last[event["rank"]] = event
    return [last[rank] for rank in sorted(last) if last[rank]["slow"]]


def slow_nodes(events: Sequence[dict[str, Any]], stage: str) -> list[str]:
    """Nodes of the stage's last start that are slow by themselves, whatever the run does: device or host."""
    return list(dict.fromkeys(event["node"] for event in stragglers(events, stage) if event["alone"]))


def newest_step(run_folder: Path, stage: str) -> int:
    """Step of the stage's newest whole checkpoint, 0 without one."""
    return int(_newest(run_folder, stage).get("step", 0))


def is_over(run_folder: Path, stage: str, steps: int, patience: int | None) -> bool:
    """Whether the stage's newest whole checkpoint is its last one: of its last step, or its score rose no more.

    steps, patience: of the recipe as it was submitted, ``stages.<stage>.evaluation.patience``.
    """
    newest = _newest(run_folder, stage)
    return ending.is_over(newest.get("step", 0), steps, newest.get("waited", 0), patience)


def _newest(run_folder: Path, stage: str) -> dict[str, Any]:
    """What the stage's newest whole checkpoint says of itself, nothing without one. Reads what ``checkpoint``
    publishes, without importing it: that takes seconds."""
    folder = run_folder / "checkpoints" / stage
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
        found: dict[str, Any] = json.loads((folder / name / "checkpoint.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}
