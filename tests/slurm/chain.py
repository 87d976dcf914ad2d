"""What the tests of the chain share: the small run on a throw-away Slurm of two nodes with two processes each."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import train_cases
import yaml
from throwaway import ThrowawaySlurm
from worlds import World

from megatron_eagle.cli import main
from megatron_eagle.cluster.events import newest_step

ROOT = Path(__file__).parents[2]
STAGES = ("stage1", "stage1.5", "stage2")
STEPS = 6  # of each stage, a checkpoint every other one
LAYOUT = {"pp": 2}  # on 4 processes: two replicas of two pipeline stages, each replica across both nodes or within one
GOOD_ENDS = ("COMPLETED",)
ENDS = (*GOOD_ENDS, "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
Losses = list[tuple[str, int, float, str]]


def small_recipe(
    small_run: Any,
    path: Path,
    *,
    steps: int | tuple[int, int, int] = STEPS,
    checkpoint_every: int = 2,
    async_save: bool = True,
) -> Path:
    """Three stages of a few steps: the connector, then everything, twice."""
    counts = (steps,) * 3 if isinstance(steps, int) else steps
    settings = small_run.settings(layout=LAYOUT)
    connector, everything = settings["stages"]
    stages = []
    for name, stage, count in zip(STAGES, (connector, everything, everything), counts, strict=True):
        saving = {"checkpoint_every": checkpoint_every, "async_save": async_save}
        stages.append({**stage, **saving, "name": name, "steps": count, "gpus": 4})
    return small_run.write_recipe(path, layout=LAYOUT, stages=stages)


def profile(path: Path, **changes: Any) -> Path:
    """A cluster profile for two processes on each of two nodes, quick to give up."""
    settings = {
        "name": "throwaway",
        "tasks_per_node": 2,
        "time_limit": "30",
        "stop_seconds": 60,
        "python": sys.executable,
        "environment": {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        "preflight": False,
        "min_free_gb": 0,
        "restarts": {"failures": 3, "without_progress": 3, "exclude_bad_nodes": True},
        "hang": {"factor": 20, "at_least": 8, "otherwise": 90, "grace": 2},
    }
    path.write_text(yaml.safe_dump(settings | changes))
    return path


@dataclass
class SubmittedChain:
    """A chain in the queue. runs: the folder of the runs; the run is called 'small'."""

    slurm: ThrowawaySlurm
    runs: Path
    jobs: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.runs / "small"

    def saved(self, stage: str) -> int:
        """Step of the stage's newest checkpoint."""
        return newest_step(self.folder, stage)

    def step(self, stage: str) -> int:
        """The last step of the stage that was logged."""
        return max((entry[1] for entry in losses(self.runs) if entry[0] == stage), default=0)

    def until_step(self, stage: str, step: int) -> None:
        asked = [time.monotonic()]

        def is_there() -> bool:
            if self.step(stage) >= step:
                return True
            if time.monotonic() < asked[0] + 1:
                return False
            asked[0] = time.monotonic()
            return self.is_over()

        self.slurm.until(is_there, f"{stage} at step {step}", 600, 0.03)

    def is_over(self) -> bool:
        return all(self.slurm.state(job) in ENDS for job in self.jobs.values())

    def wait(self, seconds: float = 240) -> dict[str, str]:
        """stage -> how its job ended."""
        try:
            self.slurm.until(self.is_over, "the chain's end", seconds, 0.5)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.logs()}") from None
        return {stage: self.slurm.state(job) for stage, job in self.jobs.items()}

    def logs(self) -> str:
        """Of its jobs, and what the controller said of them."""
        logs = [f"--- {log.name}\n{log.read_text()}" for log in sorted((self.folder / "jobs").glob("*.log"))]
        about = re.compile(rf"JobId=({'|'.join(self.jobs.values())})\b|slurmctld version|Terminate signal")
        told = (self.slurm.folder / "slurmctld.log").read_text().splitlines()
        return "\n".join([*logs, "--- slurmctld.log", *filter(about.search, told)])

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(runs: Path) -> Losses:
    path = runs / "small" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:  # being written
            continue
    return [(entry["stage"], entry["step"], entry["loss"], entry["sample_digest"]) for entry in entries]


def command(
    *arguments: str, environment: dict[str, str] | None = None, seconds: float = 240
) -> "subprocess.CompletedProcess[str]":
    """``megatron-eagle`` with these arguments."""
    variables = (environment or dict(os.environ)) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "megatron_eagle", *arguments]
    return subprocess.run(line, env=variables, text=True, capture_output=True, timeout=seconds, check=False)


def submit(slurm: ThrowawaySlurm, recipe: Path, cluster: Path, runs: Path, *more: str) -> SubmittedChain:
    """One ``megatron-eagle submit``; the chain it put into the queue."""
    arguments = ("submit", str(recipe), "--cluster", str(cluster), "--runs", str(runs), *more)
    said = io.StringIO()
    # In this process, which has long imported what a new one would take seconds for.
    with mock.patch.dict(os.environ, slurm.environment), contextlib.redirect_stdout(said):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
    jobs = [line.split(": job ") for line in said.getvalue().splitlines() if ": job " in line]
    return SubmittedChain(slurm, runs, {stage: rest.split(",")[0] for stage, rest in jobs})


def without_slurm(recipe: Path, runs: Path, worlds: Callable[[int], World]) -> Losses:
    """The same stages in four processes that no scheduler started: what every chain has to arrive at."""
    for stage in STAGES:
        worlds(4).run(train_cases.train, str(recipe), stage, str(runs), timeout=900.0)
    return losses(runs)


def stand_in_python(folder: Path) -> Path:
    """An interpreter that trains with ``stand_in.py`` and is otherwise the real one; for ``profile(python=...)``.

    Each ``megatron-eagle job`` gets the ranks' signal to stop, as one that comes a moment too late or too early, and
    the first is killed where STAND_IN_KILLS_NOTE names a folder that is not there yet.
    """
    script = folder / "python"
    stand_in = Path(__file__).with_name("stand_in.py")
    script.write_text(
        "#!/bin/bash\n"
        f'if [ "$3" = train ]; then shift 2; exec {sys.executable} {stand_in} "$@"; fi\n'
        'if [ "$3" = job ] && [ -n "$STAND_IN_KILLS_NOTE" ] && mkdir "$STAND_IN_KILLS_NOTE" 2>/dev/null; then\n'
        "    kill -KILL $$\nfi\n"
        'if [ "$3" = job ]; then kill -USR1 $$; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return script
