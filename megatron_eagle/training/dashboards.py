"""Opens the dashboards that a training log also writes to: TensorBoard, and Weights & Biases if it is asked for."""

import importlib
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
