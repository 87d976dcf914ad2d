"""What a stage has cost: hours of its processes, which are GPUs where there are any, from the run's events alone.

Slurm's own accounting knows more, but not which stage of which run a job was, and many sites have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Usage:
    """hours: of all processes together. at_least: some start ended without a word, and is not in ``hours``."""

    hours: float = 0.0
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.hours:,.1f}{'+' * self.at_least}"


def usage(events: Sequence[dict[str, Any]], stage: str, running_until: datetime | None) -> Usage:
    """Of all starts of ``stage``, those of earlier submissions included.

    running_until: now, if the stage's job runs; its last start is counted up to then.
    """
    seconds, unknown, processes = 0.0, 0, 0
    began: datetime | None = None
    for event in events:
        if event.get("stage") != stage:
            continue
        if event["event"] == "submitted":
            processes = event["processes"]
        elif event["event"] == "started":
            unknown += began is not None
            began = datetime.fromisoformat(event["time"])
        elif event["event"] == "ended" and began is not None:
            if event["outcome"] == "interrupted":  # noted by the next start, after a wait of unknown length
                unknown += 1
            else:
                seconds += processes * (datetime.fromisoformat(event["time"]) - began).total_seconds()
            began = None
    if began is not None and running_until is not None:
        seconds += processes * (running_until - began).total_seconds()
    elif began is not None:
        unknown += 1
    return Usage(seconds / 3600, unknown > 0)
