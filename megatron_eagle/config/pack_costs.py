"""What a pack costs beside its tokens, by arithmetic on the model's numbers; it decides which rank gets which packs.

The unit is one token of the language model without attention, which takes 2 operations a parameter forward, as many for
the gradient of its inputs, and as many for that of its weights if they train. Norms and activations are left out.
"""

from collections.abc import Collection
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_eagle.config.encoders import encoder_config, encoder_spec
from megatron_eagle.config.layout import STRICT, Layout
from megatron_eagle.config.model import EagleConfig, QwenConfig, mixture_channels, tokens_per_tile
from megatron_eagle.config.numbers import NotNegative, Positive
from megatron_eagle.errors import UserError


@dataclass(frozen=True, config=STRICT)
class PackCosts:
    """In tokens of the language model; ``ReadingSettings`` explains both. The defaults: Qwen2.5-7B, no encoders."""

    attention_parity: Positive = 65_000
    tile_cost: NotNegative = 0.0


def model_costs(config: EagleConfig, layout: Layout, trainable: Collection[str]) -> PackCosts:
    """The costs of a stage that trains the parts ``trainable`` of this model in this layout.

    Spread encoders cost nothing here: their tiles are shared out over all processes, whoever's pack they are of.
    """
    tile = 0.0 if layout.encoder == "spread" else tile_cost(config, trainable)
    return PackCosts(attention_parity(config.language), tile)


def attention_parity(language: QwenConfig) -> int:
    """Tokens of a segment whose attention costs as much as all the rest: parameters / (layers x hidden).

    Causal attention over n tokens takes 4 n^2 / 2 x hidden x layers operations, the rest 2 n x parameters. 65 027 for
    Qwen2.5-7B, 16 643 for 0.5B. Where the language model is frozen it is two thirds of that, which is not counted.
    """
    parameters = language.parameters_without_embeddings
    return max(1, round(parameters / (language.num_hidden_layers * language.hidden_size)))


def tile_cost(config: EagleConfig, trainable: Collection[str]) -> float:
    """Operations of encoders and connector on a tile over those of the language model on a token.

    A part that trains runs three passes (forward, gradient of its inputs, of its weights), a frozen one those that are
    needed: frozen encoders one, a frozen connector one or two, a frozen language model two, since something before it
    trains. Pixels need no gradient. An encoder that does not say what it costs counts nothing. ``model/flops.py``
    counts the same but for norms and biases, which are parameters and no products (below 1 %); it needs torch.
    """
    encoders = sum(_encoder_operations(settings, trains="vision" in trainable) for settings in config.encoders)
    before = "vision" in trainable or "connector" in trainable
    hidden = config.language.hidden_size
    connector = 2.0 * tokens_per_tile(config) * hidden * (mixture_channels(config) + hidden)
    language = 2.0 * config.language.parameters_without_embeddings * (3 if "language" in trainable else 2)
    return (encoders + connector * (1 + before + ("connector" in trainable))) / language


def _encoder_operations(settings: dict[str, Any], *, trains: bool) -> float:
    """Of one encoder on a tile."""
    try:
        cost = encoder_spec(settings["kind"]).part("cost")
    except UserError:
        return 0.0
    first, rest = cost.operations(encoder_config(settings))
    return float(first.total + rest.total if trains else first.forward + rest.forward)
