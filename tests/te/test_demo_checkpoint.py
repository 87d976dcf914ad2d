"""A checkpoint that the demo has trained goes into the Transformer Engine model and back, and comes back to the bit.

The demo is shortened to a few samples and two steps of its first two stages, in its two processes; ``--demo-run
runs/demo`` takes the last checkpoint of a whole one.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from short_demo import FEW, RECIPE, short_recipe
from test_over_the_stub import LOCAL, TE, build, differences, start, stored, weights

from megatron_eagle.checkpoint.files import find_latest, load_training_state, read_description
from megatron_eagle.checkpoint.saver import Saver
from megatron_eagle.compat.platform import install
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.demo import run as demo
from megatron_eagle.parallel.process_pool import World
from megatron_eagle.training.loop import StageRun
from megatron_eagle.training.run_folder import RunFolder

pytestmark = pytest.mark.slow


def train(recipe_path: str, stages: tuple[str, ...], folder: str) -> None:
    """What ``megatron-eagle train`` does in each of the demo's processes."""
    recipe, run = load_recipe(Path(recipe_path)), RunFolder(Path(folder))
    for stage in stages:
        StageRun(recipe, recipe.stage(stage), run, install(), start(recipe_path)).train()
        parallel_state.destroy_model_parallel()


def there_and_back(recipe: str, checkpoint: str, folder: str) -> tuple[int, list[str], list[str], list[str]]:
    """How many weights; what differs before anything is loaded, in Transformer Engine's model, after the way back."""
    groups, description = start(recipe), read_description(Path(checkpoint))
    local, te, back = (
        build(recipe, implementation, seed, groups, description.stage)
        for seed, implementation in enumerate((LOCAL, TE, LOCAL), 1)
    )
    apart = differences(weights(local), weights(te))
    place = load_training_state(Path(checkpoint), description, local.state(), groups)
    assert load_training_state(Path(checkpoint), description, te.state(), groups) == place
    there = differences(weights(local), weights(te)) + differences(stored(local), stored(te))
    saver = Saver(Path(folder), groups, torch.device("cpu"), keep=1)
    saver.start(description, te.state(), place)
    saver.finish(must=True)
    saved = find_latest(Path(folder))
    assert saved is not None and load_training_state(saved, description, back.state(), groups) == place
    return (
        len(weights(local)),
        apart,
        there,
        differences(weights(local), weights(back)) + differences(stored(local), stored(back)),
    )


@pytest.fixture
def trained(
    stubbed: Callable[[int], World],
    worlds: Callable[[int], World],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> SimpleNamespace:
    """recipe, checkpoint: of the demo."""
    if folder := request.config.getoption("--demo-run"):
        recipe, stage = RECIPE, "stage2"
    else:
        folder, recipe, stage = tmp_path / "runs" / "demo", short_recipe(tmp_path), "stage1.5"
        settings = load_recipe(recipe)
        demo._prepare_data(folder, Path(settings.tokenizer.path), settings.model.eagle().language.vocab_size, FEW)
        worlds(2).run(train, str(recipe), ("stage1", stage), str(folder))
    checkpoint = find_latest(Path(folder) / "checkpoints" / stage)
    assert checkpoint is not None and read_description(checkpoint).complete
    return SimpleNamespace(recipe=str(recipe), checkpoint=str(checkpoint))


def test_the_demos_checkpoint_goes_to_transformer_engine_and_back(
    stubbed: Callable[[int], World],
    trained: SimpleNamespace,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "back" / "stage"
    answers = stubbed(2).run(there_and_back, trained.recipe, trained.checkpoint, str(folder))
    assert all(apart and not there and not back for _, apart, there, back in answers), answers
    assert sum(count for count, *_ in answers) > 60, "of a mixture of two encoders, a connector and three layers"
