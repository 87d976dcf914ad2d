"""Recipes: what is accepted, what is refused and in which words, and how overrides reach their key."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.pack_costs import model_costs
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.config.recipe import Recipe, load_recipe, recipe_as_yaml
from megatron_eagle.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


def minimal() -> dict:
    stage = {"trainable": ["connector"], "steps": 2, "pack_length": 512, "batch": 2, "learning_rate": 1e-3}
    return {
        "name": "r",
        "model": {"preset": "tiny"},
        "tokenizer": {"kind": "sentencepiece", "path": "t.model"},
        "stages": [{**stage, "name": name, "blend": [{"path": "data"}]} for name in ("stage1", "stage1.5")],
    }


def load(tmp_path: Path, raw: object, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_every_example_is_accepted_and_survives_being_printed(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    printed = tmp_path / "printed.yaml"
    printed.write_text(recipe_as_yaml(recipe))
    assert load_recipe(printed) == recipe


def test_published_stages_of_eagle2_9b() -> None:
    """Eagle 2 (arXiv 2501.14818) and table 8 of Eagle 2.5 (arXiv 2504.15271)."""
    recipe = load_recipe(EXAMPLES / "eagle2-9b" / "recipe.yaml")
    published = [
        ("stage1", ("connector",), 4096, 1024, 2e-4, 128),
        ("stage1.5", ("vision", "connector", "language"), 8192, 1024, 2e-5, 256),
        ("stage2", ("vision", "connector", "language"), 16384, 256, 2e-5, 256),
    ]
    assert [(s.name, s.trainable, s.pack_length, s.batch, s.learning_rate, s.gpus) for s in recipe.stages] == published


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": {"tp": 3}}, "tp=3 does not divide 4 attention heads"),
        ({"layout": {"pp": 2}}, "pp=2 x vpp=1 does not divide 3 layers"),
        ({"layout": {"pp": 2, "layers_per_stage": [1, 1]}}, r"adds up to 2 layers, the language model has 3"),
        ({"layout": {"pp": 2, "layers_per_stage": [1, 2, 1]}}, "3 entries, pp=2 x vpp=1 needs 2"),
        ({"layout": {"sequence_parallel": True}}, "sequence_parallel needs tp > 1"),
        ({"layout": {"cp": 3}}, "stage 'stage1': a pack of 512 tokens cannot be cut into 6 chunks"),
        ({"layout": {"tp": 0}}, r"layout\.tp: a whole number of at least 1 is wanted \(got 0\)"),
        ({"layout": {"tpp": 2}}, r"layout\.tpp: no such key"),
        ({"modle": {}}, "modle: no such key"),
        ({"model": {"preset": "eagle3"}}, "preset 'eagle3' does not exist; there are .*eagle2-9b"),
        ({"model": {"preset": "tiny", "encoders": [{"kind": "vit"}]}}, "vit"),
        ({"model": {"preset": "tiny", "encoders": []}}, "at least one encoder"),
        ({"model": {"preset": "tiny", "language": {"hidden_size": 130}}}, "130 is not a multiple of 4"),
        ({"stages": []}, "no stages"),
        ({"reading": {"min_tiles": 9, "max_tiles": 4}}, "min_tiles=9 is more than max_tiles=4"),
        (
            {"reading": {"packing": "tight"}},
            r"reading\.packing: packing rule 'tight' does not exist; there are balanced, best_fit, greedy",
        ),
        ({"precision": "fp16"}, r"precision: .*\(got 'fp16'\)"),
    ],
)
def test_impossible_recipes_are_refused_with_the_numbers(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        load(tmp_path, {**minimal(), **change})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, r"stages\.stage1\.steps: a whole number"),
        ({"trainable": []}, "stage 'stage1' trains nothing"),
        ({"trainable": ["head"]}, r"\(got 'head'\)"),
        ({"blend": []}, "stage 'stage1' has no data"),
        ({"part_learning_rates": {"vision": 1e-4}}, "gives a learning rate to vision, which it does not train"),
        ({"freeze": ["language.embeddings"]}, "'language.embeddings' is of language, which does not train at all"),
        ({"layer_decay": {"vision": 0.9}}, "gives a layer_decay to vision, which it does not train"),
        ({"neftune_alpha": -1}, "neftune_alpha"),
        ({"name": "stage1.5"}, "stage names must differ"),
        ({"pack_length": 8}, "pack_length=8 cannot hold one tile of 16 tokens"),
        ({"learning_rate": -1}, "learning_rate"),
    ],
)
def test_impossible_stages_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    raw = minimal()
    raw["stages"][0] |= change
    with pytest.raises(UserError, match=words):
        load(tmp_path, raw)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    raw = minimal()
    del raw["stages"][0]["batch"]
    with pytest.raises(UserError, match=r"stages\.stage1\.batch: this key is needed"):
        load(tmp_path, raw)


def test_overrides_reach_stages_by_name_and_by_number(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        minimal(),
        "layout.tp=2",
        "stages.stage1.steps=7",
        "stages.stage1.5.steps=9",
        "stages.1.batch=4",
        "reading.workers=1",
        "stages.stage1.blend.0.weight=2.5",
        "model.language.num_hidden_layers=6",
    )
    assert recipe.layout.tp == 2
    assert [stage.steps for stage in recipe.stages] == [7, 9]
    assert [stage.batch for stage in recipe.stages] == [2, 4]
    assert recipe.reading.workers == 1
    assert recipe.stages[0].blend[0].weight == 2.5
    assert recipe.model.eagle().language.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("layout.tp", "not of the form"),
        ("stages.stage9.steps=1", r"no entry 'stage9' among 2 \(stage1, stage1.5\)"),
        ("name.first=x", "single value"),
        ("layout.size=2", r"layout\.size: no such key"),
        ("layout.tp=[", r"override 'layout.tp=\[': not YAML: "),
    ],
)
def test_overrides_that_reach_nothing_are_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, minimal(), override)


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(UserError, match="broken.yaml: not YAML: line 1, column 7"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match="must hold a mapping"):
        load(tmp_path, ["a", "list"])


def test_an_unknown_stage_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'stage3' does not exist; the recipe has stage1, stage1.5"):
        load(tmp_path, minimal()).stage("stage3")


OTHER_THAN_DEFAULT = {
    "tiling_rule": "area",
    "min_tiles": 2,
    "max_tiles": 6,
    "max_tiles_per_pack": 40,
    "order": "buffer",
    "packing": "best_fit",
    "packing_delta": 3,
    "degrade": True,
    "decoder": "dali",
    "video": {"max_frames": 9},
    "plan_window": 5000,
    "attention_parity": 777,
    "tile_cost": 1.5,
    "reader_timeout": 60,
    "packing_buffer": 7,
    "shuffle_buffer": 8,
    "max_samples_per_sequence": 9,
    "max_pixels": 10_000,
    "max_rejected_in_a_row": 11,
    "system": "Answer briefly.",
    "workers": 2,
}


def test_every_knob_of_reading_is_tried_below() -> None:
    assert {knob.name for knob in fields(ReadingSettings)} == set(OTHER_THAN_DEFAULT)


@pytest.mark.parametrize("name", OTHER_THAN_DEFAULT)
def test_every_knob_of_reading_can_be_set_and_reaches_the_stream(tmp_path: Path, name: str) -> None:
    value = OTHER_THAN_DEFAULT[name]
    by_file = load(tmp_path, {**minimal(), "reading": {name: value}})
    assert load(tmp_path, minimal(), f"reading.{name}={json.dumps(value)}") == by_file
    before = load(tmp_path, minimal())
    settings, usual = (recipe.data_settings(recipe.stages[0]) for recipe in (by_file, before))
    assert settings.reading == by_file.reading != usual.reading
    if name != "workers":  # which says who reads, not what
        assert [key for key, now in settings.flat().items() if now != usual.flat()[key]] == [name]


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"attention_parity": 0}, r"reading\.attention_parity: .*\(got 0\)"),
        ({"tile_cost": -1}, r"reading\.tile_cost: .*\(got -1\)"),
        ({"max_pixels": 0}, r"reading\.max_pixels"),
        ({"packing_delta": 3, "packing": "best_fit"}, "packing_delta=3 belongs to packing=balanced"),
        ({"decoder": "dali", "order": "buffer"}, "decoder=dali needs order=planned"),
        ({"video": {"frame": "{what}"}}, "video.frame='{what}' cannot be filled in"),
        ({"pack_length": 3}, r"reading\.pack_length: no such key"),
    ],
)
def test_impossible_reading_is_refused(tmp_path: Path, reading: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, {**minimal(), "reading": reading})


def test_a_blend_that_its_order_cannot_draw_is_refused_with_the_stage(tmp_path: Path) -> None:
    raw = minimal()
    raw["stages"][1]["blend"] = [{"path": "data", "repeat": 2.0}]
    load(tmp_path, raw)
    with pytest.raises(UserError, match=r"stage 'stage1\.5': repeat needs order=planned"):
        load(tmp_path, raw, "reading.order=buffer")


def test_costs_of_packs_are_the_models_unless_they_are_set(tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal())
    settings = recipe.data_settings(recipe.stages[0])
    costs = model_costs(recipe.model.eagle(), Layout(), ("connector",))
    assert (settings.attention_parity, settings.tile_cost) == (costs.attention_parity, costs.tile_cost)
    assert settings.attention_parity < 10_000 and settings.tile_cost > 0
    spread = load(tmp_path, minimal(), "stages.stage1.layout.encoder=spread")
    assert [spread.data_settings(stage).tile_cost > 0 for stage in spread.stages] == [False, True]
    given = load(tmp_path, minimal(), "reading.attention_parity=5", "reading.tile_cost=0")
    assert [given.data_settings(given.stages[0]).flat()[n] for n in ("attention_parity", "tile_cost")] == [5, 0]


def test_each_stage_draws_its_data_from_a_seed_of_its_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal(), "seed=40")
    assert [recipe.data_seed(stage) for stage in recipe.stages] == [40, 41]
    assert recipe.data_seed(replace(recipe.stages[1], batch=7)) == 41  # a stage that a bench made smaller


def test_a_stages_own_layout_replaces_the_recipes(tmp_path: Path) -> None:
    raw = {**minimal(), "layout": {"tp": 2, "sequence_parallel": True}}
    raw["stages"][1]["layout"] = {"cp": 2}
    recipe = load(tmp_path, raw)
    assert recipe.stage_layout(recipe.stages[0]) == Layout(tp=2, sequence_parallel=True)
    assert recipe.stage_layout(recipe.stages[1]) == Layout(cp=2)


@pytest.mark.parametrize("swapped", [False, True])
def test_overrides_of_a_stages_layout_start_from_the_recipes(tmp_path: Path, swapped: bool) -> None:
    raw = {**minimal(), "layout": {"pp": 3, "encoder": "spread"}}
    overrides = ["stages.stage1.5.layout.tp=2", "layout.cp=2", "stages.stage1.5.layout.cp=1"]
    recipe = load(tmp_path, raw, *(reversed(overrides) if swapped else overrides))
    assert recipe.layout == recipe.stage_layout(recipe.stages[0]) == Layout(pp=3, cp=2, encoder="spread")
    assert recipe.stage_layout(recipe.stages[1]) == Layout(tp=2, pp=3, encoder="spread")
    again = load(tmp_path, raw, "stages.stage1.layout.encoder=tensor", "stages.stage1.layout=null")
    assert again == load(tmp_path, raw)


def test_a_stages_layout_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'stage1\.5': tp=3 does not divide 4 attention heads"):
        load(tmp_path, minimal(), "stages.stage1.5.layout.tp=3")
    with pytest.raises(UserError, match=r"stages\.stage1\.layout\.size: no such key"):
        load(tmp_path, minimal(), "stages.stage1.layout.size=2")


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"cp": 4, "least_cp": 4}, "cp=4 must be least_cp=4 times 2, 4, 8"),
        ({"least_cp": 1}, "cp=1 must be least_cp=1 times 2, 4, 8"),
        ({"cp": 6, "least_cp": 2}, "cp=6 must be least_cp=2 times 2, 4, 8"),
        ({"cp": 2, "pp": 2, "least_cp": 1}, "least_cp=1 needs pp=1, this layout has pp=2"),
        ({"cp": 4, "ulysses": 2, "least_cp": 1}, "least_cp=1 needs ulysses=1, this layout has ulysses=2"),
    ],
)
def test_layouts_whose_packs_cannot_be_shared_unequally_are_refused(layout, reason):
    with pytest.raises(ValueError, match=reason):
        Layout(**layout)
    assert Layout(cp=8, least_cp=2).least_cp == 2
