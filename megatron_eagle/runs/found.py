"""A run's folder read as a whole: what each start was made of, the numbers of its steps, its checkpoints, its score."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.best import read_best
from megatron_eagle.checkpoint.files import find_latest, read_description
from megatron_eagle.errors import UserError
from megatron_eagle.training.fencing import read_starts
from megatron_eagle.training.log import METRICS_FILE, StepRecord, read_metrics

ACCURACY_FILE = Path("evaluation") / "accuracy.json"


@dataclass(frozen=True)
class Run:
    """starts: what every start said of itself, in their order. metrics: step records by stage.

    peak_bytes: highest resident memory over all processes, by stage that has a checkpoint. accuracy: of the last
    evaluation, 0 to 1, None without one.
    """

    folder: Path
    starts: tuple[dict[str, Any], ...]
    metrics: dict[str, list[StepRecord]]
    peak_bytes: dict[str, int]
    accuracy: float | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def facts(self) -> dict[str, Any]:
        """Everything that the starts say, flat: recipe values by their key, of each stage those of its last start."""
        found: dict[str, Any] = {}
        for start in self.starts:
            found |= start.get("recipe", {})
            found |= {key: start[key] for key in ("version", "commit", "device", "processes") if key in start}
            found |= {f"packages.{name}": version for name, version in start.get("packages", {}).items()}
        return found


def read_run(folder: Path) -> Run:
    """The run in ``folder``; UserError if nothing has been trained there."""
    metrics = read_metrics(folder)
    return Run(folder, tuple(read_starts(folder)), metrics, _peaks(folder, metrics), _accuracy(folder))


def find_runs(root: Path) -> list[Path]:
    """Folders below ``root`` in which something was trained, by name; UserError if there is no such folder."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: nothing has been trained here (--runs)")
    return sorted(file.parent for file in root.glob(f"*/{METRICS_FILE}"))


def old_checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints of a run that no stage goes on from: those older than the newest whole one of their stage, without
    the one that ``evaluation.keep: best`` keeps.

    Newer ones may just be written, so that deleting what is found here disturbs no trainer at work.
    """
    for stage in sorted((folder / "checkpoints").glob("*/")):
        newest = find_latest(stage)
        if newest is not None:
            best = read_best(stage)
            older = [path for path in stage.glob("step_*[0-9]") if _step(path) < _step(newest)]
            yield from sorted((path for path in older if not best or path.name != best.name), key=_step)


def size_of(folder: Path) -> int:
    """Bytes of all files below ``folder``; what is deleted meanwhile counts as nothing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _peaks(folder: Path, stages: dict[str, list[StepRecord]]) -> dict[str, int]:
    found = {}
    for stage in stages:
        latest = find_latest(folder / "checkpoints" / stage)
        if latest is not None:
            found[stage] = read_description(latest).peak_rss_bytes
    return found


def _accuracy(folder: Path) -> float | None:
    try:
        share = json.loads((folder / ACCURACY_FILE).read_text(encoding="utf-8"))["overall"]
    except (OSError, ValueError, KeyError):
        return None
    return float(share)
