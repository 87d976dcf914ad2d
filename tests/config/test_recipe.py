"""Recipes: what is accepted, what is refused and in which words, and how overrides reach their key."""

from pathlib import Path

import pytest
import yaml

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
        ({"layout": {"tp": 0}}, r"layout\.tp: .*greater than or equal to 1 \(got 0\)"),
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
        ({"precision": "fp8"}, r"precision: .*\(got 'fp8'\)"),
    ],
)
def test_impossible_recipes_are_refused_with_the_numbers(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        load(tmp_path, {**minimal(), **change})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, r"stages\.0\.steps"),
        ({"trainable": []}, "stage 'stage1' trains nothing"),
        ({"trainable": ["head"]}, r"\(got 'head'\)"),
        ({"blend": []}, "stage 'stage1' has no data"),
        ({"part_learning_rates": {"vision": 1e-4}}, "gives a learning rate to vision, which it does not train"),
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
    with pytest.raises(UserError, match=r"stages\.0\.batch: this key is needed"):
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
    ],
)
def test_overrides_that_reach_nothing_are_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, minimal(), override)


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match="must hold a mapping"):
        load(tmp_path, ["a", "list"])


def test_an_unknown_stage_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'stage3' does not exist; the recipe has stage1, stage1.5"):
        load(tmp_path, minimal()).stage("stage3")
