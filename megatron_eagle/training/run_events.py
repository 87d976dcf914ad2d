"""Adds to ``events.jsonl`` in a run's folder, where jobs of the chain and the trainer note what happened to the run."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_eagle.training.json_lines import append_text

EVENTS_FILE = "events.jsonl"


def append_event(run_folder: Path, event: str, **values: Any) -> None:
    """Add one line; OSError (ENOSPC, EDQUOT, ...) unless the disk has the whole of it."""
    append_events(run_folder, event, [values])


def append_events(run_folder: Path, event: str, many: Sequence[dict[str, Any]]) -> None:
    """Add several lines of one kind in a single write."""
    run_folder.mkdir(parents=True, exist_ok=True)
    begun = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
    text = "".join(json.dumps({**begun, **values}) + "\n" for values in many)
    append_text(run_folder / EVENTS_FILE, text, durable=True)
