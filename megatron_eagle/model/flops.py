"""Floating-point operations that a step needs, counted from its real tiles and segments and from what trains.

Most reported utilisation of vision-language models is wrong: it forgets the encoders, counts padding, counts a
segment's attention as if the pack were one long sample, or bills a weight gradient for weights that are frozen. Here

- language and encoders are counted apart, and attention by the pairs of positions that really attend to each other;
- a frozen part costs its forward pass, and the gradient of its inputs only if something in front of it trains;
- recomputation is not work that the model needs; it costs time (``timing.py``), not utilisation.

A multiplication and an addition are two operations. Norms, activations and softmax are left out, as everywhere; they
are below 1 % of the whole. ``tests/planning/test_flops.py`` holds the rest against PyTorch's operator-level counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.layers import Tower, learning_layers
from megatron_eagle.config.model import EagleConfig, QwenConfig, encoder_names, mixture_channels, tokens_per_tile
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.model.cost import Flops, Parts
from megatron_eagle.model.encoders import encoder_cost


@dataclass(frozen=True)
class Work:
    """What a pack asks of the model: tokens; pairs, (query, key) positions that attend to each other; tiles."""

    tokens: float
    pairs: float
    tiles: float

    @staticmethod
    def of_segments(lengths: Sequence[int], tiles: int) -> "Work":
        """``lengths``: tokens of each segment."""
        return Work(sum(lengths), sum(n * (n + 1) / 2 for n in lengths), tiles)

    @staticmethod
    def useful(batch: PackedBatch) -> "Work":
        """The work in a pack that is not padding, which is its last segment."""
        borders = [border for border in batch.borders if border <= batch.useful_tokens]
        return Work.of_segments([end - start for start, end in pairwise(borders)], len(batch.tile_starts))

    @staticmethod
    def computed(batch: PackedBatch) -> "Work":
        """All that a pack makes the machine do, padding included."""
        return Work.of_segments(batch.segment_lengths, len(batch.tile_starts))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.tiles + other.tiles)

    def __mul__(self, times: float) -> "Work":
        return Work(self.tokens * times, self.pairs * times, self.tiles * times)


@dataclass(frozen=True)
class StepFlops:
    """Operations of some work, encoders (with connector) and language model apart."""

    language: Flops
    encoder: Flops

    @property
    def total(self) -> float:
        return self.language.total + self.encoder.total


def step_flops(config: EagleConfig, parts: Parts, work: Work) -> StepFlops:
    """Operations of forward and backward over ``work``."""
    return StepFlops(
        language=language_flops(config.language, parts, work),
        encoder=(vision_flops(config, parts) + connector_flops(config, parts)) * work.tiles,
    )


def language_flops(language: QwenConfig, parts: Parts, work: Work) -> Flops:
    """All layers and the prediction of the vocabulary; of frozen layers no gradients of weights."""
    layers, tokens = language.num_hidden_layers, work.tokens
    learn, head = learning_of_language(language, parts)
    frozen = parts.without_language()
    return (
        layer_flops(language, parts, tokens) * len(learn)
        + layer_flops(language, frozen, tokens) * (layers - len(learn))
        + attention_flops(language, parts, work.pairs) * layers
        + head_flops(language, parts if head else frozen, tokens)
    )


def learning_of_language(language: QwenConfig, parts: Parts) -> tuple[list[int], bool]:
    """(layers of the language model that have something to train, whether its output matrix has)."""
    own = Tower("language", language)
    learn = learning_layers(own, parts.frozen) if parts.language else []
    matrix = -1 if language.tie_word_embeddings else own.depth
    return [layer for layer in learn if 0 <= layer < own.depth], matrix in learn


def layer_flops(language: QwenConfig, parts: Parts, tokens: float) -> Flops:
    """The matrix products of one decoder layer, without the attention core."""
    hidden, heads = language.hidden_size, language.num_attention_heads
    projections = hidden * language.head_dim * (2 * heads + 2 * language.num_key_value_heads)  # q and out, k and v
    products = _products(2.0 * tokens * (projections + 3 * hidden * language.intermediate_size), parts)
    return products + _adapters(language_adapters(language, parts), parts, tokens)


@dataclass(frozen=True)
class AdapterShape:
    """inputs, outputs: of the layer. matrices: that are fused in it, each with an A of its own."""

    inputs: int
    outputs: int
    matrices: int = 1


def language_adapters(language: QwenConfig, parts: Parts) -> dict[str, AdapterShape]:
    """The adapters of a decoder layer that train, by place."""
    hidden, inner = language.hidden_size, language.intermediate_size
    shapes = {
        "qkv": AdapterShape(hidden, hidden + 2 * language.num_key_value_heads * language.head_dim, 3),
        "proj": AdapterShape(hidden, hidden),
        "fc1": AdapterShape(hidden, 2 * inner, 2),
        "fc2": AdapterShape(inner, hidden),
    }
    return {place: shape for place, shape in shapes.items() if parts.adapts(f"language.{place}")}


def _adapters(shapes: dict[str, AdapterShape], parts: Parts, tokens: float) -> Flops:
    """A and B as they are multiplied: rows of B with the zeros for the other matrices of a fused layer."""
    if parts.lora is None:
        return Flops()
    each = sum(2.0 * parts.lora.rank * shape.matrices * (shape.inputs + shape.outputs) for shape in shapes.values())
    return Flops(each * tokens, each * tokens, each * tokens)


def attention_flops(language: QwenConfig, parts: Parts, pairs: float) -> Flops:
    """Scores and weighted sum of one layer: two products of head_dim per pair and head, twice that backward."""
    forward = 4.0 * pairs * language.hidden_size
    return Flops(forward, 2 * forward if parts.any else 0.0)


def head_flops(language: QwenConfig, parts: Parts, tokens: float) -> Flops:
    """The product with the output embedding, over the vocabulary as it is held in memory."""
    return _products(2.0 * tokens * language.hidden_size * language.padded_vocab_size, parts)


def _products(forward: float, parts: Parts) -> Flops:
    learns = parts.learns_weights("language")
    return Flops(forward, forward if parts.any else 0.0, forward if learns else 0.0)


def connector_flops(config: EagleConfig, parts: Parts) -> Flops:
    """The connector on one tile."""
    hidden, tokens = config.language.hidden_size, tokens_per_tile(config)
    forward = 2.0 * tokens * hidden * (mixture_channels(config) + hidden)
    needed = forward if parts.features_need_gradient else 0.0
    products = Flops(forward, needed, forward if parts.learns_weights("connector") else 0.0)
    shapes = {"fc1": AdapterShape(mixture_channels(config), hidden), "fc2": AdapterShape(hidden, hidden)}
    adapted = {place: shape for place, shape in shapes.items() if parts.adapts(f"connector.{place}")}
    return products + _adapters(adapted, parts, tokens)


def vision_flops(config: EagleConfig, parts: Parts) -> Flops:
    """All encoders on one tile."""
    found = zip(encoder_names(config), config.encoders, strict=True)
    return sum((encoder_flops(settings, parts, name) for name, settings in found), Flops())


def encoder_flops(settings: dict[str, Any], parts: Parts, name: str = "") -> Flops:
    """One encoder on one tile; pixels need no gradient, so its first product makes none. Its adapters, less than a
    hundredth of it, are left out. name: the encoder's among the weights, for frozen layers, all taken as alike.
    """
    first, rest = encoder_cost(settings).operations(encoder_config(settings))
    learns, behind = _learning_shares(settings, parts, name)
    if not behind:
        return Flops(first.forward + rest.forward)
    weights = first.weight_gradient + rest.weight_gradient if parts.learns_weights("vision") else 0.0
    return Flops(first.forward + rest.forward, rest.input_gradient * behind, weights * learns)


def _learning_shares(settings: dict[str, Any], parts: Parts, name: str) -> tuple[float, float]:
    """(share of an encoder's layers that train, share from the first of them on, through which gradients pass)."""
    own = [one for one in parts.frozen if one.tower.name == f"vision.{name}"]
    if not own or not parts.vision:
        return float(parts.vision), float(parts.vision)
    tower = own[0].tower
    learn = learning_layers(tower, own)
    if not learn:
        return 0.0, 0.0
    layers = [layer for layer in learn if 0 <= layer < tower.depth]
    return len(layers) / tower.depth, (tower.depth - max(0, learn[0])) / tower.depth
