"""Where everything of a run lies on disk, and which of its checkpoints a stage starts from."""

from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.checkpoint.files import (
    Description,
    find_good,
    find_latest,
    read_description,
    require_same_model,
    require_whole,
)
from megatron_eagle.config.ending import out_of_patience
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.errors import UserError


def ended_early(description: Description, stage: Stage) -> bool:
    """Whether ``stage`` is over with this checkpoint of it because its score rose no more (``evaluation.patience``)."""
    return out_of_patience(description.waited, stage.patience)


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies: ``<runs>/<recipe name>/``."""

    path: Path

    def stage_checkpoints(self, stage_name: str) -> Path:
        return self.path / "checkpoints" / stage_name

    def weights_before(self, recipe: Recipe, stage: Stage) -> Path | None:
        """The checkpoint ``stage`` starts from: the last one of the stage before, or the recipe's initial weights, of
        LoRA its initial adapters.

        None for a first stage without. Raises UserError if it is missing, of another model, or of a
        stage that is not finished.
        """
        before = recipe.stage_before(stage)
        if before is None:
            given = recipe.lora.initial if recipe.lora else recipe.model.initial_weights
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
        if recipe.lora is None:
            require_whole(checkpoint, description)
        reached = before is None or description.step >= min(description.steps, before.steps)
        if before is not None and not (reached or ended_early(description, before)):
            raise UserError(
                f"stage '{before.name}' has reached step {description.step} of {description.steps}; finish it first"
            )
        return checkpoint

    def way_on(self, damaged: Path, recipe: Recipe, stage: Stage) -> str:
        """What ``--fallback`` would do about a damaged checkpoint of ``stage`` or of the one before, and what it costs.

        Reads whole checkpoints, like ``find_good``.
        """
        before = recipe.stage_before(stage)
        of_before = before is not None and damaged.parent == self.stage_checkpoints(before.name)
        of = before if before is not None and of_before else stage
        if damaged.parent != self.stage_checkpoints(of.name):
            return "It is no checkpoint of this run: restore it"
        good, _ = find_good(damaged.parent)
        lost = int(damaged.name.rpartition("_")[2]) - (read_description(good).step if good else 0)
        origin = f"goes on from {good}" if good else "starts anew, because none of its other checkpoints is whole"
        again = f"'{of.name}' {origin}, and {lost} of its {of.steps} steps are trained again"
        if of is stage:
            return f"The same command with --fallback: {again}"
        both = f"with '--fallback' and '--stage {of.name}' (of submit: '--stages {of.name},{stage.name}')"
        return f"The same command {both}: {again}, then '{stage.name}' starts"
