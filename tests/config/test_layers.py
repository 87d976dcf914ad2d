"""Names of layers: what they mean in a model, what is refused, and how rates fall from layer to layer."""

import pytest

from megatron_eagle.config.layers import check_frozen, frozen_layers, rate_multiple, towers
from megatron_eagle.config.presets import PRESETS, SMALLEST

ALL = ("vision", "connector", "language")
EIGHT = "language.decoder.layers.{}.mlp.linear_fc1.weight"
TIED, OUTPUT = "language.embedding.word_embeddings.weight", "language.output_layer.weight"
SIGLIP, CONVNEXT = "vision.siglip.", "vision.convnext."


def frozen(name: str, weight: str, config=SMALLEST) -> bool:
    return any(one.holds(weight) for one in frozen_layers(config, [name]))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("language.layers[:-3]", [0, 1, 2, 3, 4]),
        ("language.layers[-2:]", [6, 7]),
        ("language.layers[2:4]", [2, 3]),
        ("language.layers[:]", list(range(8))),
        ("language.embeddings", []),
    ],
)
def test_layers_are_sliced_as_python_does(name: str, layers: list[int]) -> None:
    assert [layer for layer in range(8) if frozen(name, EIGHT.format(layer))] == layers


def test_embeddings_and_output_stand_apart_but_where_they_are_one() -> None:
    untied = PRESETS["eagle2-9b"]
    assert frozen("language.embeddings", TIED) and frozen("language.embeddings", OUTPUT)
    assert frozen("language.embeddings", TIED, untied) and not frozen("language.embeddings", OUTPUT, untied)
    assert frozen("language.output", OUTPUT, untied) and not frozen("language.output", OUTPUT)
    assert frozen("language.output", "language.decoder.final_layernorm.weight")
    assert frozen("vision.siglip.embeddings", SIGLIP + "patch_embedding.weight")
    assert frozen("vision.siglip.output", SIGLIP + "transformer.final_layernorm.weight")
    assert frozen("vision.convnext", CONVNEXT + "stem.weight") and not frozen("vision.convnext", SIGLIP + "x")


def test_blocks_of_a_convnext_are_counted_over_its_stages() -> None:
    (tower,) = [one for one in towers(PRESETS["eagle2-9b"]) if one.name == "vision.convnext"]
    places = {"stem": -1, "stages.0.2": 2, "stages.1.0": 3, "stages.1.1": 3, "stages.1.4": 6, "stages.3.3": 39}
    assert {name: tower.layer_of(f"{CONVNEXT}{name}.x") for name in places} == places and tower.depth == 40


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["language.layers[:9]"], r"'language.layers\[:9\]' does not fit the 8 layers of language, 0 to 7"),
        (["language.layers[4:4]"], "does not fit the 8 layers"),
        (["vision.dino.layers[:1]"], "there are language, vision.siglip, vision.convnext"),
        (["vision.siglip", "vision.convnext"], "freeze leaves nothing of vision to train"),
    ],
)
def test_what_a_model_does_not_have_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_frozen(SMALLEST, names, ALL)


def test_rates_fall_from_the_output_to_the_embeddings() -> None:
    found, decay = towers(SMALLEST), {"language": 0.5}
    rates = [rate_multiple(found, decay, name) for name in (TIED, EIGHT.format(0), EIGHT.format(7), OUTPUT)]
    assert rates == [0.5**9, 0.5**8, 0.5, 0.5**9]
    assert rate_multiple(found, decay, "language.decoder.final_layernorm.weight") == 1.0
    assert rate_multiple(found, decay, SIGLIP + "position_embedding") == 1.0
    assert rate_multiple(found, {"vision": 0.5}, SIGLIP + "position_embedding") == 0.5**3
    assert rate_multiple(found, {"vision": 0.5}, "connector.linear_fc1.weight") == 1.0
