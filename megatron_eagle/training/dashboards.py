"""Opens the dashboards that a training log also writes to: TensorBoard, and W&B and MLflow if they are asked for."""

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError


def open_tensorboard(folder: Path, resumed_at: int) -> Any:
    """A writer of event files in ``folder`` that drops steps after ``resumed_at``; UserError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard was asked for and is not installed: pip install tensorboard") from error
    # purge_step makes TensorBoard forget the steps that the process before us logged after its last checkpoint.
    return SummaryWriter(str(folder), purge_step=resumed_at + 1)


def open_wandb(folder: Path, project: str, stage: str, resumed_at: int, about: Mapping[str, Any]) -> Any:
    """The W&B run of ``stage``, the same one as before if the stage was resumed; UserError without the package.

    about: plain data that the run shows as its config.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"W&B (project {project!r}) was asked for and is not installed: pip install wandb") from error
    identity_file = folder / f"wandb-{stage}.id"
    identity = identity_file.read_text().strip() if resumed_at > 0 and identity_file.is_file() else None
    name = f"{folder.name}-{stage}"
    run = wandb.init(project=project, group=folder.name, name=name, dir=str(folder), id=identity, resume="allow")
    identity_file.write_text(run.id + "\n")
    run.config.update(dict(about), allow_val_change=True)  # a start that goes on may say otherwise
    # A resumed run logs steps again; with a step axis of our own W&B takes them instead of refusing to go backwards.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


class MlflowRun:
    """The MLflow run of a stage, the same one as before if the stage was resumed; UserError without the package.

    Where it is kept MLflow decides (MLFLOW_TRACKING_URI). about: plain data, kept as the run's ``start-STEP.json``.
    MLflow cannot forget: steps that are trained again stand there twice, the later ones with a later time.
    """

    def __init__(self, folder: Path, experiment: str, stage: str, resumed_at: int, about: Mapping[str, Any]) -> None:
        try:
            mlflow = importlib.import_module("mlflow")
        except ImportError as error:
            wanted = f"MLflow (experiment {experiment!r}) was asked for"
            raise UserError(f"{wanted} and is not installed: pip install mlflow-skinny") from error
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        identity_file = folder / f"mlflow-{stage}.id"
        if resumed_at > 0 and identity_file.is_file():
            self._id = identity_file.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self._client.create_experiment(experiment)
            self._id = self._client.create_run(place, run_name=f"{folder.name}-{stage}").info.run_id
            identity_file.write_text(self._id + "\n")
        if about:
            self._client.log_dict(self._id, dict(about), f"start-{resumed_at}.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step."""
        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def finish(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)
