"""A stage that continues with another recipe: the schedule is the recipe's, what differs is said or refused."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from train_cases import metrics, train, train_and_watch
from worlds import WorldError

from megatron_eagle.checkpoint.files import Description
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.errors import UserError
from megatron_eagle.training.resume_rules import recipe_values, require_continuable
from megatron_eagle.training.run_folder import RunFolder

STAGE = "second"
SAVED = ("stages.second.steps=4",)


@pytest.fixture(scope="module")
def trained(small_run, worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a recipe whose stage has made four of four steps, everything training; to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    stage = {**small_run.settings()["stages"][1], "checkpoint_every": 2}
    recipe = small_run.write_recipe(folder / "r.yaml", stages=[stage])
    worlds(1).run(train, str(recipe), STAGE, str(folder / "runs"), SAVED)
    return folder


def resume(worlds, trained: Path, tmp_path: Path, *overrides: str) -> tuple[str, list[list[tuple[float, float]]]]:
    """Continue a copy of ``trained``; what ``train_and_watch`` says."""
    shutil.copytree(trained / "runs", tmp_path / "runs", dirs_exist_ok=True)
    return worlds(1).run(train_and_watch, str(trained / "r.yaml"), STAGE, str(tmp_path / "runs"), overrides)[0]


def refusal(worlds, trained: Path, tmp_path: Path, *overrides: str) -> str:
    """The one line of a UserError."""
    with pytest.raises(WorldError) as caught:
        resume(worlds, trained, tmp_path, *overrides)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("megatron_eagle.errors.UserError: "), str(caught.value)
    assert len(metrics(tmp_path / "runs")) == 4  # nothing was trained
    return last


SCHEDULES = {
    "steps": (("stages.second.steps=8",), "steps 4 -> 8"),
    "many more steps": (("stages.second.steps=16",), "steps 4 -> 16"),
    "constant": (
        ("stages.second.steps=8", "stages.second.decay=constant", "stages.second.learning_rate=1e-5"),
        "decay cosine -> constant, stages.second.learning_rate 0.001 -> 1e-05, stages.second.steps 4 -> 8",
    ),
    "linear": (("stages.second.steps=8", "stages.second.decay=linear"), "decay cosine -> linear"),
    "warm-up": (("stages.second.steps=8", "stages.second.warmup_fraction=0.75"), "warmup_fraction 0.03 -> 0.75"),
    "final": (("stages.second.steps=8", "stages.second.final_fraction=0.5"), "final_fraction 0.0 -> 0.5"),
    "weight decay": (("stages.second.steps=8", "optimizer.weight_decay=0.2"), "optimizer.weight_decay 0.05 -> 0.2"),
    "part rates": (
        ("stages.second.steps=8", "stages.second.part_learning_rates={vision: 1e-4, connector: 5e-3}"),
        "part_learning_rates.vision (nothing) -> 0.0001",
    ),
}


OFTEN = ("many more steps", "part rates")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [pytest.param(*SCHEDULES[name], id=name, marks=() if name in OFTEN else pytest.mark.long) for name in SCHEDULES],
)
def test_the_schedule_is_that_of_the_recipe_given(
    trained: Path, worlds, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    """From the first step after the checkpoint on, rates and weight decay are those of a run never interrupted."""
    said, used = resume(worlds, trained, tmp_path, *overrides)
    recipe, whole = str(trained / "r.yaml"), str(tmp_path / "whole")
    wanted = worlds(1).run(train_and_watch, recipe, STAGE, whole, overrides)[0][1]
    assert used == wanted[4:] and len(used) >= 4
    assert any(rate > 0 for rate, _ in used[0])
    lines = [line for line in said.splitlines() if "resumed with changes" in line]
    assert len(lines) == 1 and lines[0].startswith("second resumed with changes: ") and words in lines[0]
    rates = [[entry["learning_rate"] for entry in metrics(runs)] for runs in (tmp_path / "runs", tmp_path / "whole")]
    assert rates[0][4:] == rates[1][4:]


def test_an_unchanged_recipe_says_nothing_and_changes_nothing(trained: Path, worlds, tmp_path: Path) -> None:
    """Stopped at a checkpoint in the middle, as a kill leaves it."""
    whole = tmp_path / "whole"
    shutil.copytree(trained / "runs", whole)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "small" / "checkpoints" / STAGE / "latest").write_text("step_00000002")
    said, used = worlds(1).run(train_and_watch, str(trained / "r.yaml"), STAGE, str(tmp_path / "runs"), SAVED)[0]
    assert len(used) == 2 and "changes" not in said
    losses = [[(entry["loss"], entry["grad_norm"]) for entry in metrics(runs)] for runs in (tmp_path / "runs", whole)]
    assert losses[0] == losses[1]


TAKEN = {
    "rate of a step": ("optimizer.clip_grad=0.5", "optimizer.clip_grad 1.0 -> 0.5"),
    "precision": ("precision=bf16", "precision fp32 -> bf16"),
    "optimizer": ("optimizer.distributed=false", "optimizer.distributed true -> false"),
    "batch": ("stages.second.batch=4", "stages.second.batch 2 -> 4"),
    "saving": ("stages.second.checkpoint_every=5", "stages.second.checkpoint_every 2 -> 5"),
    "layout": ("layout.encoder=spread", "layout.encoder tensor -> spread"),
    "stage's layout": ("stages.second.layout={encoder: spread}", "layout.encoder tensor -> spread"),
    "weights before": ("model.initial_weights=x", "model.initial_weights null -> x (no effect: the weights are the ch"),
}


@pytest.mark.parametrize(("override", "words"), TAKEN.values(), ids=TAKEN)
def test_what_may_change_is_said(trained: Path, worlds, tmp_path: Path, override: str, words: str) -> None:
    said, used = resume(worlds, trained, tmp_path, "stages.second.steps=5", override)
    assert len(used) == 1 and words in said and "stages.second.steps 4 -> 5" in said


REFUSED = {
    "steps": (("stages.second.steps=3",), "is at step 4, stage 'second' has only 3 steps (it had 4)"),
    "precision": (("precision=bf16", "optimizer.distributed=false"), "precision is fp32 there, bf16 in the recipe"),
    "freeze": (("stages.second.trainable=[connector]",), '["vision", "connector", "language"] there, ["connector"] in'),
    "layers": (("stages.second.freeze=[language.embeddings]",), 'freeze is [] there, ["language.embeddings"] in'),
    "normaliser": (("stages.second.loss_normaliser=pack",), "loss_normaliser is global there, pack in the recipe"),
    "model": (("model.language.intermediate_size=96",), "language.intermediate_size is 64 there, 96 in the recipe"),
    "pack length": (("stages.second.pack_length=1024",), "pack_length was 512, is 1024"),
    "seed": (("seed=7",), "seed was 1234, is 7"),
    "order": (("reading.order=buffer",), "reading.order planned -> buffer"),
    "tiles": (("reading.max_tiles=2",), "max_tiles was 12, is 2"),
    "batch in the middle": (("stages.second.batch=3",), "after 8 packs"),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_meaningless_is_refused(
    trained: Path, worlds, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    steps = () if "stages.second.steps=3" in overrides else ("stages.second.steps=8",)
    assert words in refusal(worlds, trained, tmp_path, *steps, *overrides)


def test_other_data_are_refused_with_their_place(small_run, trained: Path, worlds, tmp_path: Path) -> None:
    other = small_run.folder / "heldout"
    said = refusal(
        worlds, trained, tmp_path, "stages.second.steps=8", f"stages.second.blend=[{{path: {other}, weight: 2}}]"
    )
    assert "sources was" in said and "stages.second.blend.0.weight 1.0 -> 2.0" in said


KINDS = list(itertools.product(("fp32", "bf16"), (True, False)))
LOADED = {("fp32", True): KINDS[:3], ("bf16", True): [KINDS[0], KINDS[2]], ("fp32", False): [KINDS[1]],
          ("bf16", False): [KINDS[3]]}  # fmt: skip


@pytest.mark.parametrize("saved", KINDS, ids=str)
def test_the_optimizer_finds_its_own_copy_of_the_weights_or_is_refused(small_run, tmp_path: Path, saved) -> None:
    """What Megatron can load, and loads without loss, by (precision, distributed)."""
    for kind in KINDS:
        old, new = (
            small_run.recipe(tmp_path / "r.yaml", (f"precision={p}", f"optimizer.distributed={d}"))
            for p, d in (saved, kind)
        )
        stage = old.stages[0]
        description = Description(stage.name, 1, 6, {}, {}, 1, recipe=recipe_values(old, stage))
        with contextlib.nullcontext() if kind in LOADED[saved] else pytest.raises(UserError, match="own copy"):
            require_continuable(Path("step_00000001"), description, new, stage)


def test_thawing_a_part_is_refused(small_run, worlds, tmp_path: Path) -> None:
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    worlds(1).run(train, recipe, "first", str(tmp_path / "runs"), ("stages.first.steps=2",))
    with pytest.raises(WorldError, match=r'trainable is \["connector"\] there, \["connector", "language"\] in the'):
        worlds(1).run(train, recipe, "first", str(tmp_path / "runs"), ("stages.first.trainable=[connector, language]",))


def test_a_checkpoint_without_its_recipe_continues_and_says_so(trained: Path, worlds, tmp_path: Path) -> None:
    """As every checkpoint before 2026-11-26 was; its schedule is the recipe's all the same."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    checkpoint = tmp_path / "runs" / "small" / "checkpoints" / STAGE / "step_00000004"
    description = json.loads((checkpoint / "checkpoint.json").read_text())
    del description["recipe"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(description))
    (checkpoint / "checksums.json").unlink()  # it may be left out
    said, used = worlds(1).run(
        train_and_watch, str(trained / "r.yaml"), STAGE, str(tmp_path / "runs"), ("stages.second.steps=8",)
    )[0]
    assert "second: step 4 was saved without its recipe, changes cannot be compared" in said
    assert used[0][0][0] > 0 and len(used) == 4


def test_a_complete_stage_says_what_it_was_trained_with(trained: Path, worlds, tmp_path: Path) -> None:
    said, used = resume(worlds, trained, tmp_path, *SAVED, "stages.second.learning_rate=1e-5")
    assert not used and "second is complete: 4 steps" in said
    assert "second was trained otherwise than the recipe says now: stages.second.learning_rate 0.001 -> 1e-05" in said


def test_a_stage_cut_short_at_its_checkpoint_is_complete(trained: Path, worlds, tmp_path: Path) -> None:
    """Saved at step 2 of 4, two steps asked for: nothing is left to train, and the next stage may start."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "small"
    (folder / "checkpoints" / STAGE / "latest").write_text("step_00000002")
    overrides = ("stages.second.steps=2",)
    said, used = worlds(1).run(train_and_watch, str(trained / "r.yaml"), STAGE, str(tmp_path / "runs"), overrides)[0]
    assert not used and "second is complete: 2 steps" in said and "stages.second.steps 4 -> 2" in said
    recipe = load_recipe(trained / "r.yaml", overrides)
    stages = (*recipe.stages, dataclasses.replace(recipe.stages[0], name="third"))
    longer = dataclasses.replace(recipe, stages=stages)
    assert RunFolder(folder).weights_before(longer, stages[1]).name == "step_00000002"
    stages = (dataclasses.replace(stages[0], steps=3), stages[1])
    with pytest.raises(UserError, match="'second' has reached step 2 of 4; finish it first"):
        RunFolder(folder).weights_before(dataclasses.replace(recipe, stages=stages), stages[1])
