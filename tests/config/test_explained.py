"""Every key has words, and what is made of them (a printed recipe, a schema, an explanation) agrees with the checks."""

import random
import time
from copy import deepcopy

import jsonschema
import pytest
import yaml

from megatron_eagle.cli import main
from megatron_eagle.config.explained import commented_yaml, explain, json_schema, keys_explained, kinds_explained
from megatron_eagle.config.findings import checked
from megatron_eagle.config.overrides import apply_overrides
from megatron_eagle.config.recipe import Recipe, load_recipe, recipe_as_data
from megatron_eagle.config.schema import _paths, at, keys_of
from megatron_eagle.config.shipped import shipped_recipes
from megatron_eagle.errors import UserError

pytestmark = pytest.mark.unit
RECIPES = sorted(shipped_recipes())
SCHEMA = json_schema()


def classes(settings: type) -> set[type]:
    below = [key.settings for key in keys_explained(settings) if key.settings is not None]
    return {settings}.union(*(classes(one) for one in below))


def test_every_key_says_what_it_does() -> None:
    everything = [*classes(Recipe), *(settings for _, settings in kinds_explained())]
    silent = [f"{one.__qualname__}.{key.name}" for one in everything for key in keys_explained(one) if not key.meaning]
    assert silent == [] and len(everything) > 12


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_has_comments_and_reads_back(name: str) -> None:
    data = recipe_as_data(load_recipe(shipped_recipes()[name]))
    text = commented_yaml(data)
    assert yaml.safe_load(text) == data
    assert max(len(line) for line in text.splitlines() if line.lstrip().startswith("#")) <= 80
    assert text.count("# optimizer steps\n") == 1  # said once, not for each stage


def test_awkward_values_read_back() -> None:
    data = recipe_as_data(load_recipe(shipped_recipes()["tiny"], ["reading.system='a: # b\n \"c\" - é'"]))
    data["reading"]["video"]["between"] = "\n"
    data["stages"][0]["blend"][0]["path"] = "- #x"
    assert yaml.safe_load(commented_yaml(data)) == data


@pytest.mark.parametrize("name", RECIPES)
def test_the_schema_takes_what_is_shipped(name: str) -> None:
    jsonschema.validate(yaml.safe_load(shipped_recipes()[name].read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("layout", "tq"), 2),
        (("layout", "tp"), 0),
        (("seed",), "x"),
        (("precision",), "fp16"),
        (("optimizer", "beta1"), 1.0),
        (("model", "language", "hidden_sze"), 8),
    ],
)
def test_the_schema_refuses_what_a_recipe_refuses(place: tuple[str, ...], value: object) -> None:
    data = recipe_as_data(load_recipe(shipped_recipes()["tiny"]))
    node = data
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_a_key_is_explained_with_its_value_in_every_stage() -> None:
    recipe = recipe_as_data(load_recipe(shipped_recipes()["eagle2-9b"]))
    said = explain("stages.steps", recipe)
    assert "whole number of at least 1" in said and "none, it is needed" in said
    assert "stages.stage1.5.steps is 5150" in said
    assert "stages.stage2.layout.tp is 2" in explain("stages.stage2.layout.tp", recipe)
    assert "siglip: hidden_size" in explain("model.encoders")
    for key in keys_of(Recipe):
        assert explain(key)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("stages.stage1.5.stpes", "no such key; there is stages.NAME.steps"),
        ("layout.tq", "no such key; there are tp, pp, cp"),
        ("layout.tp.x", "layout.tp.x: no such key"),
        ("", "no such key"),
    ],
)
def test_an_unknown_key_is_answered_with_what_was_meant(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        explain(path)


def test_of_200_typos_nine_in_ten_are_answered_with_the_right_key() -> None:
    """Letters dropped, swapped, doubled, replaced, in keys drawn evenly; on one line and within a second each."""
    rng, right, slowest, paths = random.Random(20261126), 0, 0.0, list(_paths(Recipe))
    shipped = yaml.safe_load(shipped_recipes()["eagle2-9b"].read_text())
    for _ in range(200):
        where, written = path_with_typo(rng, paths)
        raw = deepcopy(shipped)
        override = ".".join([*where[:-1], written]).replace("NAME", "stage2")
        begun = time.perf_counter()
        with pytest.raises(UserError) as refused:
            apply_overrides(raw, [f"{override}=1"], Recipe)
            checked(Recipe, raw, "eagle2-9b")
        slowest = max(slowest, time.perf_counter() - begun)
        words = str(refused.value)
        right += where[-1] in words.rpartition(";")[2].replace(",", " ").replace(".", " ").replace("?", " ").split()
        assert "\n" not in words
    assert right >= 180, right
    assert slowest < 1


def path_with_typo(rng: random.Random, paths: list[str]) -> tuple[list[str], str]:
    """Where a key stands, and its name written wrongly in a way that is no other key there."""
    while True:
        where = rng.choice(paths).split(".")
        key, number = where[-1], rng.randrange(len(where[-1]))
        written = rng.choice(
            [
                key[:number] + key[number + 1 :],
                key[:number] + key[number : number + 2][::-1] + key[number + 2 :],
                key[:number] + key[number] + key[number:],
                key[:number] + rng.choice("abcdefghijklmnopqrstuvwxyz") + key[number + 1 :],
            ]
        )
        if written and written not in keys_of(at(Recipe, where[:-1]) if where[:-1] else Recipe):
            return where, written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "there is no verb 'trian'; did you mean train?"),
        (["xyzzy"], "there is no verb 'xyzzy'; there are data, curate, recipe"),
        (["data", "biuld"], "did you mean build?"),
        (["recipe"], "RECIPE is needed"),
        (["recipe", "--explain", "layout.tq"], "there are tp, pp"),
    ],
)
def test_a_wrong_verb_is_answered_with_the_right_one(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and words in said.err and said.err.count("\n") == 1, said
