"""The running mean of the weights against the plain recurrence, in checkpoints, and in place of the weights."""

import shutil
from pathlib import Path

import pytest
import torch
from train_cases import losses, train, weights
from worlds import WorldError

from megatron_eagle.conversion.convert import Options, megatron_to_hf
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.conversion.torch_dist import AveragedWeights, TorchDist
from megatron_eagle.errors import UserError

DECAY = 0.75  # far from both ends, so that three steps show any slip
EMA = f"stages.second.ema={DECAY}"
EVERY = (
    "stages.second.checkpoint_every=1",
    "stages.second.keep_checkpoints=9",
    "stages.second.steps=3",
    "stages.second.decay=constant",
)
CASES = {
    "dp=2": ("precision=bf16",),
    "pp=2, tied, spread": ("layout.pp=2", "layout.encoder=spread"),
    "tp=2, not distributed": ("layout.tp=2", "layout.sequence_parallel=true", "optimizer.distributed=false"),
    "cp=2": ("layout.cp=2",),
}


@pytest.fixture(scope="module")
def recipe(small_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    return small_run.write_recipe(folder / "r.yaml", stages=[small_run.settings()["stages"][1]])


def stage_folder(runs: Path) -> Path:
    return runs / "small" / "checkpoints" / "second"


def steps_of(runs: Path) -> list[TorchDist]:
    return [TorchDist(folder) for folder in sorted(stage_folder(runs).glob("step_*"))]


def main_weights(stored: TorchDist, names: list[str]) -> list[torch.Tensor]:
    """What the optimizer steps on, in float32, by the names of stored tensors."""
    prefix = "optimizer.state.param."
    return [stored.read(prefix + name if prefix + name in stored.names else name) for name in names]


@pytest.fixture(scope="module")
def trained(recipe: Path, worlds) -> dict[str, Path]:
    """Runs of three steps, each with a checkpoint."""
    runs = {name: recipe.parent / name for name in (*CASES, "without")}
    for name, overrides in CASES.items():
        worlds(2).run(train, str(recipe), "second", str(runs[name]), (*EVERY, *overrides, EMA))
    worlds(2).run(train, str(recipe), "second", str(runs["without"]), (*EVERY, *CASES["dp=2"]))
    return runs


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_plain_recurrence(trained: dict[str, Path], name: str) -> None:
    stored = steps_of(trained[name])
    names = sorted(name.removeprefix("ema.") for name in stored[0].names if name.startswith("ema."))
    # What training began with is not on disk: the first mean holds it.
    mean = [stored[0].read(f"ema.{name}").double() for name in names]
    for step in stored[1:]:
        mean = [DECAY * m + (1 - DECAY) * w.double() for m, w in zip(mean, main_weights(step, names), strict=True)]
        for name, wanted in zip(names, mean, strict=True):
            got = step.read(f"ema.{name}")
            assert got.dtype == torch.float32
            assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-7), name


def test_it_changes_nothing_else(trained: dict[str, Path]) -> None:
    assert losses(trained["dp=2"]) == losses(trained["without"])
    ours, plain = steps_of(trained["dp=2"])[-1], steps_of(trained["without"])[-1]
    weights = {name for name in plain.names if not name.startswith("optimizer.")}
    assert ours.names == plain.names | {f"ema.{name}" for name in weights}
    assert all(torch.equal(ours.read(name), plain.read(name)) for name in plain.names)


def test_it_begins_with_the_weights_that_the_stage_begins_with(trained, recipe: Path, worlds) -> None:
    step = steps_of(trained["pp=2, tied, spread"])[0]
    (drawn,) = worlds(1).run(weights, str(recipe), "", "")
    for name, weight in drawn.items():
        wanted = DECAY * weight + (1 - DECAY) * step.read(name)
        assert torch.allclose(step.read(f"ema.{name}"), wanted, rtol=1e-5, atol=1e-7), name


def go_on(worlds, recipe: Path, made: Path, to: Path, *changes: str) -> TorchDist:
    """Train the last step of a copy of ``made`` again, otherwise."""
    shutil.copytree(made, to)
    folder = stage_folder(to)
    shutil.rmtree(folder / "step_00000003")
    (folder / "latest").write_text("step_00000002")
    worlds(2).run(train, str(recipe), "second", str(to), (*EVERY, *changes))
    return steps_of(to)[-1]


@pytest.mark.parametrize(
    "name",
    [
        "pp=2, tied, spread",
        "tp=2, not distributed",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("dp=2", "cp=2")),
    ],
)
def test_it_goes_on_to_the_last_bit(trained, recipe: Path, worlds, tmp_path: Path, name: str) -> None:
    got = go_on(worlds, recipe, trained[name], tmp_path / "runs", *CASES[name], EMA)
    wanted = steps_of(trained[name])[-1]
    assert got.names == wanted.names and all(torch.equal(got.read(each), wanted.read(each)) for each in got.names)
    assert losses(tmp_path / "runs") == losses(trained[name])


def test_begun_in_the_middle(trained, recipe: Path, worlds, tmp_path: Path) -> None:
    """A checkpoint without one, of a stage that goes on with one."""
    got = go_on(worlds, recipe, trained["without"], tmp_path / "runs", *CASES["dp=2"], EMA)
    names = [name.removeprefix("ema.") for name in got.names if name.startswith("ema.")]
    before, after = (main_weights(step, names) for step in steps_of(tmp_path / "runs")[-2:])
    for name, old, new in zip(names, before, after, strict=True):
        assert torch.allclose(got.read(f"ema.{name}"), DECAY * old + (1 - DECAY) * new, rtol=1e-5, atol=1e-7), name


def loaded(recipe_path: str, checkpoint: str) -> dict[str, torch.Tensor]:
    """Runs in every process of a world: what ``evaluate --ema`` asks."""
    from datetime import timedelta

    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.evaluation.loading import load_model
    from megatron_eagle.parallel.groups import initialise

    recipe, platform = load_recipe(Path(recipe_path)), install()
    initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    model = load_model(recipe, Path(checkpoint), recipe.layout, platform, ema=True)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_it_is_asked_in_place_of_the_weights(trained, recipe: Path, worlds) -> None:
    end = steps_of(trained["pp=2, tied, spread"])[-1]
    (asked,) = worlds(1).run(loaded, str(recipe), str(end.folder))
    assert all(torch.equal(tensor, end.read(f"ema.{name}")) for name, tensor in asked.items())
    with pytest.raises(WorldError, match="holds no running mean of the weights: its stage was trained without"):
        worlds(1).run(loaded, str(recipe), str(steps_of(trained["without"])[-1].folder))


def test_it_goes_out_in_place_of_the_weights(trained, tmp_path: Path) -> None:
    end = steps_of(trained["pp=2, tied, spread"])[-1]
    proof = megatron_to_hf(end.folder, tmp_path / "out", Options(), ema=True)
    assert proof.source.endswith("step_00000003, its running mean") and not proof.failures
    assert not any(name.startswith("ema.") for name in proof.unused)
    embedding = SafetensorsFolder(tmp_path / "out").read("language_model.model.embed_tokens.weight")
    assert torch.equal(embedding, end.read("ema.language.embedding.word_embeddings.weight")[:400])
    assert not torch.equal(embedding, end.read("language.embedding.word_embeddings.weight")[:400])
    with pytest.raises(UserError, match="step_00000003 holds no running mean of the weights"):
        AveragedWeights(steps_of(trained["without"])[-1].folder)


def test_of_adapters(small_run, worlds, tmp_path: Path) -> None:
    lora = {"rank": 2, "targets": ["language", "connector"]}
    (stage, _) = small_run.settings()["stages"]
    changes = {"stages": [{**stage, "name": "second", "trainable": ["language"]}], "lora": lora}
    path = small_run.write_recipe(tmp_path / "r.yaml", **changes)
    worlds(2).run(train, str(path), "second", str(tmp_path), (*EVERY[1:], "precision=bf16", EMA))
    end = steps_of(tmp_path)[-1]
    means = {name for name in end.names if name.startswith("ema.")}
    assert len(means) == 8 and all(name.endswith(("lora_a", "lora_b")) for name in means)
    (asked,) = worlds(1).run(loaded, str(path), str(end.folder))
    name = "language.decoder.layers.1.mlp.linear_fc1.lora_b"
    assert float(asked[name].abs().max()) > 0 and torch.equal(asked[name], end.read(f"ema.{name}"))
