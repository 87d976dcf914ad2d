"""The dashboards that a training log also writes to: TensorBoard, and W&B and MLflow if they are asked for.

Those two are servers of other people's. Training neither ends nor waits because of one: ``Sender`` speaks to it on a
thread of its own, says once what went wrong and at the end how much was not sent. TensorBoard's events go to the disk
that ``metrics.jsonl`` is on.
"""

import importlib
import posixpath
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_eagle.errors import UserError

SECONDS_TO_FINISH = 10.0  # at the end of a stage, for what is not sent yet
ROOM = 10_000  # lines that wait for a server that does not answer; those that come later are not sent
_NAME_LENGTH = 250  # MLflow's limit


class Dashboard(Protocol):
    """What takes the numbers of steps; each may fail or hang."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Sender:
    """Hands steps to a dashboard in their order, on a thread of its own.

    name: as it is said. opened: opens the dashboard, on that thread; where it fails it is tried again at the next step.
    patience: seconds that ``finish`` waits; SECONDS_TO_FINISH by default.
    """

    def __init__(self, name: str, opened: Callable[[], Dashboard], *, patience: float | None = None) -> None:
        self._name, self._opened = name, opened
        self._patience = SECONDS_TO_FINISH if patience is None else patience
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(ROOM)
        self._given = self._sent = 0
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name} log", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step; returns at once."""
        self._given += 1
        try:
            self._waiting.put_nowait((step, values))
        except queue.Full:
            self._say(f"step {step}: {ROOM:,} steps before it wait for an answer")

    def finish(self) -> None:
        """Wait for what is not sent yet, at most ``patience`` seconds, and say how many lines that leaves."""
        ends = time.monotonic() + self._patience
        try:
            self._waiting.put(None, timeout=self._patience)
            self._thread.join(max(0.0, ends - time.monotonic()))
        except queue.Full:
            pass
        self._over.set()  # whatever is answered now comes too late
        if self._sent < self._given:
            lacking = f"{self._given - self._sent} of {self._given} lines were not sent to {self._name}"
            print(f"{lacking}; metrics.jsonl has them all", flush=True)
        elif self._thread.is_alive():
            self._say(f"the end of the run: no answer in {self._patience:g} s")

    def _work(self) -> None:
        dashboard = None
        while (line := self._waiting.get()) is not None and not self._over.is_set():
            try:
                dashboard = dashboard or self._opened()
                dashboard.log(line[1], line[0])
            except Exception as error:  # noqa: BLE001  theirs, of any kind
                self._say(f"step {line[0]}: {_one_line(error)}")
            else:
                self._sent += not self._over.is_set()
        try:
            if dashboard is not None:
                dashboard.finish()
        except Exception as error:  # noqa: BLE001
            self._say(f"the end of the run: {_one_line(error)}")

    def _say(self, what: str) -> None:
        if not self._failed and not self._over.is_set():
            print(f"{self._name} did not take {what}; training goes on without it", flush=True)
        self._failed = True


def _identity_file(path: Path, resumed_at: int) -> Path:
    """``path``, where a start from nothing leaves no run of before to go on with."""
    if resumed_at == 0:
        path.unlink(missing_ok=True)
    return path


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def open_tensorboard(folder: Path, resumed_at: int) -> Any:
    """A writer of event files in ``folder`` that drops steps after ``resumed_at``; UserError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard was asked for and is not installed: pip install tensorboard") from error
    # purge_step makes TensorBoard forget the steps that the process before us logged after its last checkpoint.
    return SummaryWriter(str(folder), purge_step=resumed_at + 1)


def send_to_wandb(folder: Path, project: str, stage: str, resumed_at: int, about: Mapping[str, Any]) -> Sender:
    """Sends to the W&B run of ``stage``, the same one as before if it was resumed; UserError without the package.

    about: plain data that the run shows as its config.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"W&B (project {project!r}) was asked for and is not installed: pip install wandb") from error
    try:  # here, since W&B asks for the main thread to begin on, and once, since it takes its time before it gives up
        run = WandbRun(wandb, folder, project, stage, resumed_at, about)
    except Exception as error:  # noqa: BLE001  theirs, of any kind
        failed = error

        def opened() -> Dashboard:
            raise failed

        return Sender("W&B", opened)
    return Sender("W&B", lambda: run)


class WandbRun:
    """The W&B run of a stage."""

    def __init__(
        self, wandb: Any, folder: Path, project: str, stage: str, resumed_at: int, about: Mapping[str, Any]
    ) -> None:
        identity_file = _identity_file(folder / f"wandb-{stage}.id", resumed_at)
        identity = identity_file.read_text().strip() if identity_file.is_file() else None
        name = f"{folder.name}-{stage}"
        self._run = wandb.init(
            project=project, group=folder.name, name=name, dir=str(folder), id=identity, resume="allow"
        )
        identity_file.write_text(self._run.id + "\n")
        self._run.config.update(dict(about), allow_val_change=True)  # a start that goes on may say otherwise
        # A resumed run logs steps again; with a step axis of our own W&B takes them instead of refusing.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step."""
        self._run.log({"step": step, **values})

    def finish(self) -> None:
        """Send what W&B still holds."""
        self._run.finish()


def send_to_mlflow(folder: Path, experiment: str, stage: str, resumed_at: int, about: Mapping[str, Any]) -> Sender:
    """Sends to the MLflow run of ``stage``, the same one as before if it was resumed; UserError without the package."""
    try:
        mlflow = importlib.import_module("mlflow")
    except ImportError as error:
        wanted = f"MLflow (experiment {experiment!r}) was asked for"
        raise UserError(f"{wanted} and is not installed: pip install mlflow-skinny") from error
    return Sender("MLflow", lambda: MlflowRun(mlflow, folder, experiment, stage, resumed_at, about))


class MlflowRun:
    """The MLflow run of a stage.

    Where it is kept and how long an answer may take says MLflow: MLFLOW_TRACKING_URI, MLFLOW_HTTP_REQUEST_TIMEOUT.
    about: plain data, kept as the run's ``start-STEP.json``.
    MLflow cannot forget: steps that are trained again stand there twice, the later ones with a later time.
    """

    def __init__(
        self, mlflow: Any, folder: Path, experiment: str, stage: str, resumed_at: int, about: Mapping[str, Any]
    ) -> None:
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        self._names: dict[str, str] = {}
        identity_file = _identity_file(folder / f"mlflow-{stage}.id", resumed_at)
        if identity_file.is_file():
            self._id = identity_file.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self._client.create_experiment(experiment)
            self._id = self._client.create_run(place, run_name=f"{folder.name}-{stage}").info.run_id
            identity_file.write_text(self._id + "\n")
        self._about = (dict(about), f"start-{resumed_at}.json") if about else None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step, under names that MLflow takes."""
        now = int(1000 * time.time())
        if self._about is not None:
            self._client.log_dict(self._id, *self._about)
            self._about = None
        for name in values:
            if name not in self._names:
                self._names[name] = mlflow_name(name, self._names.values())
        metrics = [self._metric(self._names[name], value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


def mlflow_name(name: str, taken: Collection[str] = ()) -> str:
    """``name`` as MLflow takes it: letters, digits, ``_-. :`` and slashes that make a plain path, up to 250 of them.

    One that is among those ``taken`` gets a number. Source: ``validate_param_and_metric_name`` and ``path_not_unique``
    of MLflow 3.17.
    """
    plain = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/")
    plain = "/".join("_" if part in ("", ".", "..") else part for part in plain.split("/"))[:_NAME_LENGTH].rstrip("/")
    found, number = plain, 1
    while found in taken:
        number += 1
        found = f"{plain[: _NAME_LENGTH - 5]}_{number}"
    return found
