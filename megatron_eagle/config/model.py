"""What an Eagle model is made of, in Hugging Face's config names, and whether a layout can hold it.

Only numbers live here; the modules that read them are those of ``megatron_eagle.model``. An encoder's own numbers live
in its folder, found by the ``kind`` a recipe names (``encoders.py``).
"""

import math
import re
from collections import Counter
from dataclasses import field
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_eagle.config.encoders import EncoderConfig, encoder_config
from megatron_eagle.config.layout import STRICT, Layout
from megatron_eagle.config.numbers import AboveZero, Flag, NotNegative, Positive

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True, config=STRICT)
class QwenConfig:
    """A Qwen2.5 language model (names of transformers' Qwen2Config).

    hidden_size: channels of a token.
    intermediate_size: channels inside the gated feed-forward block.
    num_hidden_layers: decoder layers.
    num_attention_heads: heads of the queries.
    num_key_value_heads: heads of keys and values, each shared by several queries.
    tie_word_embeddings: whether the output layer is the input embedding.
    max_position_embeddings: longest segment it was made for, in tokens.
    rms_norm_eps: added to the mean square in norms.
    rope_theta: base of the rotary positions' wave lengths.
    initializer_range: standard deviation of weights drawn from the seed.
    vocab_size: rows of the embedding in the checkpoint, i.e. the length of the tokenizer after Eagle's special
        tokens were added.
    """

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    vocab_size: Positive
    tie_word_embeddings: Flag
    max_position_embeddings: Positive = 32768
    rms_norm_eps: NotNegative = 1e-6
    rope_theta: AboveZero = 1e6
    initializer_range: NotNegative = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of {self.num_attention_heads} attention heads"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def depth(self) -> int:
        return self.num_hidden_layers

    def layer_of(self, name: str) -> int:
        """As ``config.layers.Layered``; the output layer is an embedding where the two are one."""
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):
            return int(match[1])
        tied = self.tie_word_embeddings and name.startswith("output_layer.")
        return -1 if tied or name.startswith("embedding.") else self.depth

    @property
    def parameters_without_embeddings(self) -> int:
        """Weights of all layers and the last norm; the two embeddings, which may be one, are left out."""
        hidden, key_value = self.hidden_size, self.num_key_value_heads * self.head_dim
        query_key_value = (hidden + 1) * (hidden + 2 * key_value)  # these have biases
        layer = query_key_value + hidden * hidden + 3 * hidden * self.intermediate_size + 2 * hidden
        return self.num_hidden_layers * layer + hidden

    @property
    def padded_vocab_size(self) -> int:
        """Rows held in memory. The same in every layout, so that a checkpoint fits all of them; the padding never
        takes part in the softmax."""
        return math.ceil(self.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True, config=STRICT)
class EagleConfig:
    """Tiles of ``tile_size`` pixels -> encoders, joined by channel -> connector -> language model.

    encoders: one mapping per encoder, ``{"kind": ..., <that encoder's own numbers>}``; order is channel order.
    """

    tile_size: Positive
    encoders: tuple[dict[str, Any], ...]
    language: QwenConfig
    connector_layer_norm_eps: NotNegative = field(default=1e-5)

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError("a mixture needs at least one encoder, this model has 0")


def encoder_configs(config: EagleConfig) -> list[EncoderConfig]:
    """The checked numbers of every encoder, in channel order; ValueError if some are wrong."""
    return [encoder_config(settings) for settings in config.encoders]


def encoder_names(config: EagleConfig) -> list[str]:
    """What each encoder is called among a model's weights: its kind, and a kind used again with a number
    (``name``, ``name_2``)."""
    seen: Counter[str] = Counter()
    names = []
    for settings in config.encoders:
        kind = settings["kind"]
        seen[kind] += 1
        names.append(kind if seen[kind] == 1 else f"{kind}_{seen[kind]}")
    return names


def tokens_per_tile(config: EagleConfig) -> int:
    """Tokens that one tile becomes in the language model; ValueError if the encoders disagree."""
    tokens = [encoder.output_tokens for encoder in encoder_configs(config)]
    if len(set(tokens)) > 1:
        counts = ", ".join(f"{s['kind']} {count}" for s, count in zip(config.encoders, tokens, strict=True))
        raise ValueError(f"encoders joined by channel must agree on the tokens per tile, got {counts}")
    return tokens[0]


def mixture_channels(config: EagleConfig) -> int:
    """Channels of a token after joining."""
    return sum(encoder.output_channels for encoder in encoder_configs(config))


def kernels_take(config: EagleConfig) -> bool:
    """Whether this project's kernels can prepare the tiles for all encoders and join what they make of them."""
    roles = [encoder.kernel_role for encoder in encoder_configs(config)]
    return roles in (["shuffled"], ["shuffled", "appended"])


def check_layout(config: EagleConfig, layout: Layout) -> None:
    """Refuse a layout that cannot hold the model; the ValueError names both numbers."""
    if layout.vpp is not None and config.language.num_hidden_layers < layout.pp * layout.vpp:
        raise ValueError(
            f"pp={layout.pp} x vpp={layout.vpp} needs at least {layout.pp * layout.vpp} layers, "
            f"the language model has {config.language.num_hidden_layers}"
        )
    _check_tensor_parallel(config.language, layout.tp)
    _check_ulysses(config.language, layout)
    _check_pipeline(config.language, layout)
    for encoder in encoder_configs(config):
        encoder.check_tile_size(config.tile_size)
        encoder.check_tensor_parallel(layout.tp)


def divides(tp: int, number: int, what: str) -> None:
    """Raise a ValueError unless ``number`` things, called ``what``, can be shared out over ``tp`` processes."""
    if number % tp:
        raise ValueError(f"tp={tp} does not divide {number} {what}")


def _check_tensor_parallel(language: QwenConfig, tp: int) -> None:
    divides(tp, language.num_attention_heads, "attention heads")
    small, large = sorted((tp, language.num_key_value_heads))
    if large % small:
        raise ValueError(
            f"tp={tp} and {language.num_key_value_heads} key/value heads: one must be a multiple of the other"
        )
    divides(tp, language.intermediate_size, "channels of intermediate_size")
    divides(tp, language.hidden_size, "channels of hidden_size")
    divides(tp, language.padded_vocab_size, "rows of the padded vocabulary")


def _check_ulysses(language: QwenConfig, layout: Layout) -> None:
    """Ulysses deals out the key/value heads of a process, of which grouped-query attention has few."""
    heads = max(1, language.num_key_value_heads // layout.tp)
    if heads % layout.ulysses:
        raise ValueError(
            f"ulysses={layout.ulysses} does not divide {heads} key/value heads of tp={layout.tp}; "
            f"cp={layout.cp} works with any ulysses that divides both"
        )


def _check_pipeline(language: QwenConfig, layout: Layout) -> None:
    if layout.layers_per_stage is not None:
        total = sum(layout.layers_per_stage)
        if total != language.num_hidden_layers:
            raise ValueError(
                f"layers_per_stage={list(layout.layers_per_stage)} adds up to {total} layers, "
                f"the language model has {language.num_hidden_layers}"
            )
    elif language.num_hidden_layers % (layout.pp * (layout.vpp or 1)):
        raise ValueError(
            f"pp={layout.pp} x vpp={layout.vpp or 1} does not divide {language.num_hidden_layers} layers; "
            "give layers_per_stage"
        )
