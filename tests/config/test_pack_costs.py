"""What a pack costs: closed formulas against the weights of the model and the operations of the planner."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.pack_costs import attention_parity, model_costs, tile_cost
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.model.cost import Parts
from megatron_eagle.model.flops import Work, attention_flops, connector_flops, layer_flops, vision_flops
from megatron_eagle.planning.parameters import stage_weights

EVERYTHING = ("vision", "connector", "language")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameters_without_embeddings_are_those_of_the_model(name: str) -> None:
    (weights,) = stage_weights(PRESETS[name], Layout(), 0)
    counted = sum(w.elements for w in weights if w.name.startswith(("language.decoder.", "language.final")))
    assert PRESETS[name].language.parameters_without_embeddings == counted > 0


def test_the_table_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (eagle2\S+) \| ([\d ]+) \| (\d+) \| (\d+) \|$", text, re.M)
    computed = [
        (name, attention_parity(config.language), *(round(tile_cost(config, t)) for t in (EVERYTHING, ("connector",))))
        for name, config in PRESETS.items()
        if name.startswith("eagle")
    ]
    assert [(name, int(parity.replace(" ", "")), int(a), int(b)) for name, parity, a, b in rows] == computed
    assert attention_parity(PRESETS["eagle2-9b"].language) == pytest.approx(65_000, rel=0.002)
    assert attention_parity(PRESETS["eagle2-1b"].language) == pytest.approx(17_000, rel=0.03)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_at_attention_parity_attention_costs_as_much_as_all_the_rest(name: str) -> None:
    language, parts = PRESETS[name].language, Parts.of(EVERYTHING)
    work = Work.of_segments([attention_parity(language)], 0)
    attention, rest = attention_flops(language, parts, work.pairs), layer_flops(language, parts, work.tokens)
    assert attention.total == pytest.approx(rest.total, rel=0.01)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("trainable", [EVERYTHING, ("connector",), ("language",), ("connector", "language")])
def test_tile_cost_is_operations_of_a_tile_in_tokens(name: str, trainable: tuple[str, ...]) -> None:
    config, parts = PRESETS[name], Parts.of(trainable)
    tile = vision_flops(config, parts) + connector_flops(config, parts)
    token = layer_flops(config.language, parts, 1.0) * config.language.num_hidden_layers
    assert tile_cost(config, trainable) == pytest.approx(tile.total / token.total, rel=0.01)


def test_costs_follow_the_placement_of_the_encoders() -> None:
    config = PRESETS["eagle2-1b"]
    hosted, spread = (model_costs(config, Layout(encoder=place), EVERYTHING) for place in ("tensor", "spread"))
    assert hosted.tile_cost > 0 and spread == replace(hosted, tile_cost=0.0)
    # The first stage's frozen encoders run forward only, the frozen language model forward and back to the connector.
    assert 0.4 < model_costs(config, Layout(), ("connector",)).tile_cost / hosted.tile_cost < 0.6
