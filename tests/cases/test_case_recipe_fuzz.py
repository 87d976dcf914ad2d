"""Thousands of recipes, turned about: each is a recipe that survives being printed, or is refused in one short line.

Keys are renamed, moved, copied, nested and removed, values exchanged for strange ones, lines written twice; some come
with overrides. That nothing else happens needs no knowledge of what is allowed.
"""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import yaml

from megatron_eagle.config.recipe import Recipe, load_recipe, recipe_as_yaml
from megatron_eagle.config.schema import places
from megatron_eagle.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/recipe.yaml"))
FAST, LONG, LONGEST = 300, 20_000, 400
SMALL = """\
name: small
model: {preset: tiny, language: {initializer_range: 0.1}, encoders: [{kind: siglip, hidden_size: 64,
  intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4, image_size: 64, patch_size: 8}]}
tokenizer: {kind: huggingface, path: tokens}
reading: {system: "", video: {fps: 2, frame: "Frame {number}: "}, workers: 2, packing: best_fit}
optimizer: {beta2: 0.95, eps: 1e-8}
layout: &layout {tp: 2, cp: 1, sequence_parallel: true}
stages:
  - {name: s1, trainable: [connector], steps: 4, pack_length: 512, batch: 2, learning_rate: 1e-3, blend: [{path: a}]}
  - {name: s2.5, trainable: [vision, connector, language], steps: 4, pack_length: 512, batch: 2, learning_rate: 2e-5,
     blend: [{path: a, weight: 2}, {path: b}], part_learning_rates: {vision: 1e-6}, layout: *layout}
"""
TEXTS = [SMALL, *(path.read_text(encoding="utf-8") for path in EXAMPLES)]
STRANGE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 4.0, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 2**31, 2**63,
    10**30, 10**400, "", " ", "x", "yes", "off", "010", "1:30", "1e-4", "1_000", ".nan", "null", "{", "\u00fc\u2028",
    "a" * 3000, "{0}", "{number", "{number.__class__}", "{time:99999999}", "\0", "2024-01-01", [], {}, [[]], [None],
    {"a": 1}, {"name": "s1"}, ["connector"], [1, 2],
]  # fmt: skip
KEYS = [
    *places(Recipe), "stepps", "learning_rte", "Layout", "<<", "", "a.b", "kind", "hidden_size", "k" * 300, "\u00fc",
]  # fmt: skip
SCALARS = [
    "010", "0o7", "1:30", "1e-4", "1_000", ".nan", "-.inf", "yes", "~", "{", "[1", "*a", "&a x", "!!int 010", "!x y",
    "@", "'", "\t1", "a: b", "|", "1e5", "0x1F", "9" * 5000, "%", "? a", "- a", "<<", "=", "2024-01-01",
    "!!binary aaaa", "\x07",
]  # fmt: skip
PLACES = list(places(Recipe).values())


def spots(value):
    """Every (container, key) of plain data."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(pairs):
        yield value, key
        yield from spots(part)


def copy(value):
    return json.loads(json.dumps(value))


def mutate(rng, raw):
    """One change of the data."""
    where, key = rng.choice(list(spots(raw)))
    mappings = [raw, *(w[k] for w, k in spots(raw) if isinstance(w[k], dict))]
    match rng.randrange(9):
        case 0 if isinstance(where, dict):
            where[rng.choice(KEYS)] = where.pop(key)
        case 1 if isinstance(where, dict):
            where[typo(rng, key)] = where.pop(key)
        case 2 if isinstance(where, dict):
            rng.choice(mappings)[rng.choice([key, *KEYS])] = where.pop(key)
        case 3 if isinstance(where, dict):
            rng.choice(mappings)[rng.choice([key, *KEYS])] = copy(where[key])
        case 4:
            where[key] = rng.choice([[where[key]], {key: where[key]}, str(where[key])])
        case 5 if isinstance(where[key], list) and where[key]:
            where[key].insert(rng.randrange(len(where[key]) + 1), copy(rng.choice(where[key])))
        case 6:
            del where[key]
        case 7 if isinstance(where[key], int | float):
            where[key] *= rng.choice([0, -1, 2, 0.5, 10**6, 1e-9])
        case _:
            where[key] = rng.choice(STRANGE)


def typo(rng, key):
    cut = rng.randrange(len(str(key)) + 1)
    return f"{str(key)[:cut]}{rng.choice(['', 'x', '_'])}{str(key)[cut + 1 :]}"


def blemish(rng, text):
    """One change of the text: a line twice, a scalar written otherwise, something cut away."""
    lines = text.splitlines()
    number = rng.randrange(len(lines))
    head, colon, _ = lines[number].partition(": ")
    match rng.randrange(4):
        case 0:
            lines.insert(number, lines[number])
        case 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[number])
        case 2 if colon:
            lines[number] = f"{head}: {rng.choice(SCALARS)}"
        case _:
            lines[number] = lines[number][: rng.randrange(len(lines[number]) + 1)]
    return "\n".join(lines)


def override(rng):
    key = rng.choice(rng.choice(PLACES)).replace("NAME", rng.choice(["s1", "s2.5", "0", "stage1", "s9"]))
    value = rng.choice([*SCALARS, "", "1", "2", "4", "0.5", "true", '"x"', "[1]", '{"a": 1}', "-1"])
    return f"{key if rng.random() < 0.8 else typo(rng, key)}{rng.choice(['=', '=', '=', '=', ''])}{value}"


def numbers(value):
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from numbers(getattr(value, field.name))
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


def recipes_hold(count, seed):
    """In the current folder, so that the length of a line is its own."""
    rng = random.Random(seed)
    accepted = 0
    for _ in range(count):
        text = rng.choice(TEXTS)
        if rng.random() < 0.7:
            raw = yaml.safe_load(text)
            for _ in range(rng.choice([0, 1, 1, 2, 3])):
                mutate(rng, raw)
            text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=rng.random() < 0.5)
        if rng.random() < 0.3:
            text = blemish(rng, text)
        overrides = [override(rng) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        try:
            recipe = load_recipe(Path("recipe.yaml"), overrides)
        except UserError as error:
            said = str(error)
            assert len(said) < LONGEST and said.isprintable() and said, (said, text, overrides)
            continue
        accepted += 1
        assert all(math.isfinite(number) for number in numbers(recipe)), (text, overrides)
        Path("printed.yaml").write_text(recipe_as_yaml(recipe), encoding="utf-8")
        assert load_recipe(Path("printed.yaml")) == recipe, (text, overrides)
    assert count // 10 < accepted < count * 9 // 10, accepted


def test_recipes_turned_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes_hold(FAST, seed=0)


@pytest.mark.long
def test_20_000_recipes_turned_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes_hold(LONG, seed=1)
