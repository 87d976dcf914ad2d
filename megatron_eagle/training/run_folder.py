"""Where everything of a run lies on disk, and which of its checkpoints a stage starts from."""

from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.checkpoint.files import find_latest, read_description, require_same_model
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies: ``<runs>/<recipe name>/``."""

    path: Path

    def stage_checkpoints(self, stage_name: str) -> Path:
        return self.path / "checkpoints" / stage_name

    def weights_before(self, recipe: Recipe, stage: Stage) -> Path | None:
        """The checkpoint ``stage`` starts from: the last one of the stage before, or the recipe's initial weights.

        None for a first stage without initial weights. Raises UserError if it is missing, of another model, or of a
        stage that is not finished.
        """
        before = recipe.stage_before(stage)
        if before is None:
            given = recipe.model.initial_weights
            checkpoint = Path(given) if given else None
        else:
            checkpoint = find_latest(self.stage_checkpoints(before.name))
            if checkpoint is None:
                raise UserError(
                    f"stage '{stage.name}' starts from '{before.name}', which has no checkpoint in "
                    f"{self.stage_checkpoints(before.name)}; train it first"
                )
        if checkpoint is None:
            return None
        description = read_description(checkpoint)
        require_same_model(checkpoint, description, recipe.model.eagle())
        if before is not None and description.step < min(description.steps, before.steps):
            raise UserError(
                f"stage '{before.name}' has reached step {description.step} of {description.steps}; finish it first"
            )
        return checkpoint
