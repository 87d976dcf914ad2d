"""A run with LoRA: what its checkpoints hold, how it goes on, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from train_cases import losses, metrics, train
from worlds import WorldError

from megatron_eagle.checkpoint.files import model_of, read_description
from megatron_eagle.config.lora import is_adapter
from megatron_eagle.conversion.adapters import Merged, base_of, lora_of
from megatron_eagle.conversion.check import dialect_of
from megatron_eagle.conversion.torch_dist import TorchDist

LORA = {"rank": 2, "alpha": 4, "targets": ["language", "vision.siglip.qkv", "vision.*.fc*", "connector"]}
FIRST = Path("small/checkpoints/first/step_00000002")
ALL = ["vision", "connector", "language"]


@pytest.fixture(scope="module")
def base(small_run, worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, ``base``, and a recipe that trains adapters on it in two stages."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = small_run.write_recipe(folder / "base.yaml", name="base")
    worlds(1).run(train, str(recipe), "first", str(folder / "runs"), ("stages.first.steps=2",))
    shutil.move(folder / "runs" / "base" / "checkpoints" / "first" / "step_00000002", folder / "base")
    first, second = small_run.settings()["stages"]
    model = {**small_run.settings()["model"], "initial_weights": str(folder / "base")}
    stages = [{**first, "trainable": ["language"], "steps": 2}, {**second, "trainable": ALL, "steps": 4}]
    small_run.write_recipe(folder / "r.yaml", model=model, lora=LORA, stages=stages)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, worlds) -> Path:
    for stage in ("first", "second"):
        worlds(1).run(train, str(base / "r.yaml"), stage, str(base / "runs"), ("stages.second.checkpoint_every=2",))
    return base


def checkpoint(folder: Path, stage: str, step: int) -> Path:
    return folder / "runs" / "small" / "checkpoints" / stage / f"step_{step:08d}"


def refusal(worlds, recipe: Path, stage: str, runs: Path, *overrides: str) -> str:
    with pytest.raises(WorldError) as caught:
        worlds(1).run(train, str(recipe), stage, str(runs), overrides)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("megatron_eagle.errors.UserError: "), str(caught.value)
    return last


def test_checkpoints_hold_adapters_alone_and_name_their_base(trained: Path) -> None:
    end = checkpoint(trained, "second", 4)
    stored, description = TorchDist(end), read_description(end)
    weights = {name for name in stored.names if not name.startswith("optimizer.")}
    assert weights and all(is_adapter(name) for name in weights)
    assert "language.decoder.layers.self_attention.linear_qkv.lora_a" in weights
    assert "connector.linear_fc2.lora_b" in weights
    assert not any("convnext" in name and "depthwise" in name for name in stored.names)
    assert description.base == read_description(checkpoint(trained, "first", 2)).base
    logged = [entry for entry in metrics(trained / "runs") if entry["stage"] == "second"]
    assert logged[-1]["loss"] < logged[0]["loss"]


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2, "encoder": "spread"}])
def test_it_goes_on_as_if_it_had_not_stopped(trained: Path, worlds, tmp_path: Path, layout) -> None:
    """In the same layout to the last bit, in another within float32's rounding: also the base's digest is the same."""
    runs = tmp_path / "runs"
    shutil.copytree(trained / "runs", runs)
    folder = checkpoint(tmp_path, "second", 4)
    shutil.rmtree(folder)
    (folder.parent / "latest").write_text("step_00000002")
    size = layout.get("tp", 1) * layout.get("pp", 1)
    overrides = tuple(f"layout.{key}={value}" for key, value in layout.items())
    worlds(size).run(train, str(trained / "r.yaml"), "second", str(runs), overrides)
    wanted, got = losses(trained / "runs"), losses(runs)
    assert [entry[3] for entry in got] == [entry[3] for entry in wanted]
    assert [entry[2] for entry in got] == pytest.approx([entry[2] for entry in wanted], rel=1e-6 if layout else 0)


def test_dropout_goes_on_exactly(base: Path, worlds, tmp_path: Path) -> None:
    changes = ("lora.dropout=0.3", "stages.first.steps=3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    worlds(1).run(train, str(base / "r.yaml"), "first", str(whole), changes)
    again = ("stages.first.checkpoint_every=1", *changes)
    worlds(1).run(train, str(base / "r.yaml"), "first", str(cut), again)
    folder = cut / "small" / "checkpoints" / "first"
    shutil.rmtree(folder / "step_00000003")
    (folder / "latest").write_text("step_00000002")
    worlds(1).run(train, str(base / "r.yaml"), "first", str(cut), again)
    assert losses(cut) == losses(whole)
    plain = tmp_path / "plain"
    worlds(1).run(train, str(base / "r.yaml"), "first", str(plain), changes[1:])
    assert losses(plain) != losses(whole)


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("second", ("model.initial_weights=null",), "holds adapters of the base"),
        ("second", ("lora=null", "stages.second.steps=8"), "holds LoRA's adapters, the recipe trains whole models"),
        ("second", ("lora.rank=3", "stages.second.steps=8"), "lora.rank is 2 there, 3 in the recipe"),
        ("second", ("lora.alpha=8", "stages.second.steps=8"), "trained with this scale"),
    ],
)
def test_what_does_not_belong_together_is_refused(trained, worlds, tmp_path, stage, overrides, words) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    if overrides == ("model.initial_weights=null",):
        overrides = (*overrides, "stages.second.steps=8")
    assert words in refusal(worlds, trained / "r.yaml", stage, tmp_path / "runs", *overrides)


def test_adapters_to_start_from(trained: Path, worlds, tmp_path: Path) -> None:
    """lora.initial: taken as they are, or refused by what differs."""
    given = ("stages.first.learning_rate=1e-9", f"lora.initial={checkpoint(trained, 'second', 4)}")
    worlds(1).run(train, str(trained / "r.yaml"), "first", str(tmp_path / "a"), given)
    name = "language.decoder.layers.1.mlp.linear_fc1.lora_b"
    ours, theirs = (
        TorchDist(folder).read(name) for folder in (checkpoint(trained, "second", 4), tmp_path / "a" / FIRST)
    )
    assert float(theirs.abs().max()) > 0 and float((ours - theirs).abs().max()) < 1e-7
    for change, words in {
        "lora.alpha=8": "holds adapters with lora.alpha=4.0, the recipe says 8.0",
        "lora.targets=[language, connector.fc1, vision.siglip]": "adapters of connector.fc2, vision.convnext.fc1, ",
    }.items():
        assert words in refusal(worlds, trained / "r.yaml", "first", tmp_path / "b", *given, change)


def score(recipe_path: str, runs: str, data: str, out: str, name: str = "second") -> None:
    """Runs in a world of one."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    stage = recipe.stage(name)
    evaluate(recipe, stage, RunFolder(Path(runs) / recipe.name), Path(data), Path(out), install(), 4)


def test_evaluation_answers_with_base_and_adapters(trained: Path, small_run, worlds, tmp_path: Path) -> None:
    worlds(1).run(
        score, str(trained / "r.yaml"), str(trained / "runs"), str(small_run.folder / "heldout"), str(tmp_path)
    )
    assert (tmp_path / "accuracy.json").is_file()


def test_adapters_are_no_initial_weights(trained: Path, worlds, tmp_path: Path) -> None:
    given = f"model.initial_weights={checkpoint(trained, 'second', 4)}"
    for lora in ((), ("lora=null",)):
        line = refusal(worlds, trained / "r.yaml", "first", tmp_path, given, *lora)
        assert "holds LoRA's adapters of the base" in line and "merges" in line


def test_a_target_that_no_layer_has(base: Path, worlds, tmp_path: Path) -> None:
    line = refusal(worlds, base / "r.yaml", "first", tmp_path, "lora.targets=[language, vision, connector.fc3]")
    assert "no layer is called connector.fc3; adapters got language.fc1" in line


def test_a_base_in_nf4(trained: Path, small_run, worlds, tmp_path: Path) -> None:
    """Its checkpoint holds and names what one on the whole base does, is merged with that one, and answers."""
    pytest.importorskip("bitsandbytes")
    settings = yaml.safe_load((trained / "r.yaml").read_text(encoding="utf-8"))
    recipe, runs = tmp_path / "r.yaml", tmp_path / "runs"
    recipe.write_text(yaml.safe_dump({**settings, "lora": {**LORA, "base": "nf4"}}), encoding="utf-8")
    worlds(1).run(train, str(recipe), "first", str(runs))
    packed, whole = TorchDist(runs / FIRST), TorchDist(trained / "runs" / FIRST)
    assert packed.names == whole.names and losses(runs)[0] != losses(trained / "runs")[0]
    description = read_description(runs / FIRST)
    assert description.base == read_description(trained / "runs" / FIRST).base
    worlds(1).run(score, str(recipe), str(runs), str(small_run.folder / "heldout"), str(tmp_path), "first")
    assert (tmp_path / "accuracy.json").is_file()
    origin, config = base_of(runs / FIRST, description, None), model_of(runs / FIRST, description)
    sources = dialect_of(origin, config, None).sources(config)
    merged = Merged(origin, packed, lora_of(runs / FIRST, description), sources)
    layer = "language.decoder.layers.1.mlp.linear_fc2."
    change = packed.read(f"{layer}lora_b") @ packed.read(f"{layer}lora_a") * 2
    assert change.any()
    assert torch.equal(merged.read(f"{layer}weight"), TorchDist(trained / "base").read(f"{layer}weight") + change)
