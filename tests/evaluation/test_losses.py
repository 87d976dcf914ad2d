"""``evaluate --losses``: every sample's loss in every layout, against plain float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import image_bytes, make_tokenizer
from train_cases import train, weights

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.recipe import Recipe, load_recipe
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample, iterate_samples
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.losses import _decode, _packs
from megatron_eagle.verification.reference import ReferenceEagle

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "two replicas": (2, ()),
    "tp, sequence parallel": (2, ("layout.tp=2", "layout.sequence_parallel=true")),
    "pp, spread": (2, ("layout.pp=2", "layout.encoder=spread")),
    "cp": (2, ("layout.cp=2",)),
}


def measure(recipe_path: str, data: str, runs: str, out: str, overrides: tuple[str, ...] = ()) -> None:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.losses import measure_losses
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path), overrides)
    measure_losses(recipe, recipe.stage("first"), RunFolder(Path(runs) / recipe.name), Path(data), Path(out), install())


def written(folder: Path, name: str = "losses.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(small_run, worlds, tmp_path_factory) -> tuple[Path, Recipe]:
    """(a folder with a recipe and its run, the recipe); trained with spread encoders."""
    folder = tmp_path_factory.mktemp("losses")
    stage = small_run.settings()["stages"][0]
    file = small_run.write_recipe(
        folder / "r.yaml", stages=[stage | {"steps": 1, "trainable": ["connector", "vision"]}]
    )
    worlds(2).run(train, str(file), "first", str(folder / "runs"), ("layout.encoder=spread",))
    return folder, load_recipe(file)


@pytest.fixture(scope="module")
def expected(small_run, worlds, trained) -> list[dict[str, Any]]:
    """Each sample alone through modules of transformers, in float64."""
    folder, recipe = trained
    (loaded,) = worlds(1).run(weights, str(folder / "r.yaml"), "first", str(folder / "runs"))
    model = ReferenceEagle(recipe.model.eagle(), seed=1)
    state = {
        name: part.double()
        for parameter, source in model.sources().items()
        for name, part in zip(source.names, source.split(loaded[parameter]), strict=True)
    }
    model.load_state_dict(model.state_dict() | state)
    planner = VisualPlanner(recipe.data_settings(recipe.stages[0]), recipe_tokenizer(recipe))
    lines = []
    for stored in iterate_samples(small_run.folder / "heldout"):
        segment, plan = tokenise(stored, planner)
        segment = add_tiles(segment, stored, plan, planner.settings)
        labels = segment.labels[1:]
        with torch.no_grad():
            logits = model(segment.tokens, segment.tiles, segment.tile_slots)[:-1]
        taught = labels != IGNORE_LABEL
        loss = float(F.cross_entropy(logits[taught], labels[taught]))
        lines.append({"id": segment.sample_id, "loss": loss, "tokens": int(taught.sum()), "length": len(labels) + 1})
    return lines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_each_sample_alone(small_run, worlds, trained, expected, tmp_path, layout: str) -> None:
    folder, _ = trained
    processes, overrides = LAYOUTS[layout]
    data = str(small_run.folder / "heldout")
    worlds(processes).run(measure, str(folder / "r.yaml"), data, str(folder / "runs"), str(tmp_path), overrides)
    lines = written(tmp_path)
    assert [{**line, "loss": 0} for line in lines] == [{**line, "loss": 0} for line in expected]
    assert max(abs(ours["loss"] - plain["loss"]) for ours, plain in zip(lines, expected, strict=True)) < 2e-6
    assert len({round(line["loss"], 3) for line in lines}) > len(lines) // 2
    assert written(tmp_path, "losses_rejected.jsonl") == []


def test_what_has_no_loss_is_named(worlds, trained, tmp_path: Path) -> None:
    folder, _ = trained

    def record(identity: str, question: str) -> dict[str, Any]:
        return {
            "id": identity,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}],
        }

    records = [record("short", "What?"), record("long", "word " * 600), record("other", "Which?")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    build_dataset(tmp_path / "samples.jsonl", tmp_path / "data")
    arguments = (str(folder / "r.yaml"), str(tmp_path / "data"), str(folder / "runs"), str(tmp_path / "out"))
    worlds(2).run(measure, *arguments)
    (rejected,) = written(tmp_path / "out", "losses_rejected.jsonl")
    assert [line["id"] for line in written(tmp_path / "out")] == ["short", "other"]
    assert rejected["id"] == "long" and "512" in rejected["reason"]


def test_every_sample_has_one_fate(tmp_path: Path) -> None:
    """Packs are made before pictures are decoded; one that turns out to be broken leaves its pack, which may be left
    with nothing."""
    settings = DataSettings(sources=(BlendSource("x"),), pack_length=64, tile_size=32, tokens_per_tile=4)
    planner = VisualPlanner(settings, make_tokenizer(tmp_path))
    whole = image_bytes((32, 32), "red")

    def stored(name: str, image: bytes) -> StoredSample:
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
        return StoredSample(parse_record({"id": name, "image": ["x"], "conversations": turns}), (image,))

    samples = [
        stored("whole", whole),
        stored("half", whole[: len(whole) // 2]),
        stored("no picture", whole[:8]),
        stored("again", whole),
    ]
    rejected: list[tuple[str, str]] = []
    packs = list(_packs(samples, planner, rejected))
    assert [name for name, _ in rejected] == ["no picture"]
    assert [one.segment.sample_id for pack in packs for one in pack] == ["whole", "half", "again"]
    batches = [_decode(pack, planner, rejected) for pack in packs]
    assert [name for name, _ in rejected] == ["no picture", "half"]
    assert [name for batch in batches if batch for name in batch.sample_ids] == ["whole", "again"]
    assert all(reason for _, reason in rejected) and None in batches


def test_a_stage_without_a_checkpoint_is_refused(small_run, trained, tmp_path: Path) -> None:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.losses import measure_losses
    from megatron_eagle.training.run_folder import RunFolder

    _, recipe = trained
    with pytest.raises(UserError, match="stage 'first' has no checkpoint"):
        measure_losses(recipe, recipe.stages[0], RunFolder(tmp_path), tmp_path, tmp_path / "out", install())
