"""What a microbatch leaves behind between its forward and its backward pass, and what each needs on top for a moment.

Derived from what autograd saves in this project's modules, tensor by tensor. ``impl: local`` with ``kernels: torch``
is what the CPU runs, and what the tests measure: the norms keep their input in float32, a SwiGLU keeps five tensors,
keys and values are copied for every query head that shares them, logits are whole and in float32. Transformer Engine's
norms need only their input and output; this project's kernels read shared heads in place and make the loss of some rows
at a time. ``local`` with ``triton`` also has Liger-Kernel's norms, SwiGLU and rotary positions. The difference is
written down per module, not fitted.

All sizes are bytes on one process.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.layers import frozen_layers, learning_layers
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, encoder_names, kernels_take, mixture_channels, tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.model.build_context import AttentionCore, Kernels, Precision, Recompute, TransformerImpl
from megatron_eagle.model.cost import EncoderRun, Held, Parts
from megatron_eagle.model.encoders import encoder_cost
from megatron_eagle.model.flops import Work, language_adapters, learning_of_language
from megatron_eagle.parallel.context import MASKED_QUERIES, ContextShard, pieces

# Rows whose logits exist at a time in eagle_kernels.linear_cross_entropy (its rows_per_chunk).
ROWS_OF_LOGITS = 4096


@dataclass(frozen=True)
class PackShape:
    """What matters of a pack: tokens of each segment, its tiles, and how long the last segment is if it is padding."""

    segments: tuple[int, ...]
    tiles: int
    padding: int = 0

    @property
    def length(self) -> int:
        return sum(self.segments)

    def computed(self) -> Work:
        """All that the pack makes the machine do."""
        return Work.of_segments(self.segments, self.tiles)

    def useful(self) -> Work:
        """The same without padding."""
        return Work.of_segments(self.segments[:-1] if self.padding else self.segments, self.tiles)


def stage_parts(recipe: Recipe, stage: Stage) -> Parts:
    """What of the model ``stage`` trains."""
    frozen = frozen_layers(recipe.model.eagle(), stage.freeze)
    return Parts.of(stage.trainable, recipe.lora, frozen, stage.new_rows_from is not None)


@dataclass(frozen=True)
class Activations:
    """The sizes of everything that passes through a process of ``layout``."""

    config: EagleConfig
    layout: Layout
    parts: Parts
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    impl: TransformerImpl = "local"
    kernels: Kernels = "torch"
    attention: AttentionCore = "packed"
    recompute_layers: int | None = None

    @staticmethod
    def of(recipe: Recipe, stage: Stage) -> "Activations":
        """Those of a stage. Kernels that it leaves open are PyTorch's (``Recipe.with_kernels_on``)."""
        return Activations(
            config=recipe.model.eagle(),
            layout=recipe.stage_layout(stage),
            parts=stage_parts(recipe, stage),
            precision=recipe.weight_precision,
            recompute=recipe.model.recompute,
            recompute_layers=recipe.model.recompute_layers,
            impl=recipe.model.transformer_impl,
            kernels=recipe.model.kernels or "torch",
            attention=recipe.model.attention,
        )

    def shared_by(self, ranks: int) -> "Activations":
        """The sizes where so many of the cp processes share a pack (``Layout.least_cp``)."""
        return replace(self, layout=replace(self.layout, cp=ranks, least_cp=None))

    def layers(self, numbers: range, pack: PackShape) -> Held:
        """The decoder layers of a virtual stage, counted over the whole model, of which some may be frozen, and the
        first ones computed again: when they are, the layers behind them hold nothing any more."""
        again: list[tuple[Held, int]] = []
        kept: list[tuple[Held, int]] = []
        for sizes, count in self.by_kind(numbers):
            (kept if sizes.recompute_layers is None else again).append((sizes.layer(pack), count))
        return _all_of(again).then(_all_of(kept))

    def by_kind(self, *stages: range) -> list[tuple["Activations", int]]:
        """Sizes around the decoder layers of virtual ``stages`` and how many have them: of those that train and those
        that do not, of those that are computed again and those that are kept."""
        learn = set(self._learning[0])
        some = self.recompute_layers
        kinds = Counter(
            (layer in learn, some is None or layer < numbers.start + some) for numbers in stages for layer in numbers
        )
        found = []
        for (learns, again), count in sorted(kinds.items(), reverse=True):
            sizes = self if learns else self._frozen
            found.append((sizes if again else replace(sizes, recompute="none", recompute_layers=None), count))
        return found

    def of_head(self) -> "Activations":
        """The sizes around the output matrix, which may be frozen."""
        return self if self._learning[1] else self._frozen

    @cached_property
    def _learning(self) -> tuple[list[int], bool]:
        """(layers that train, whether the output matrix does)"""
        return learning_of_language(self.config.language, self.parts)

    @cached_property
    def _frozen(self) -> "Activations":
        return replace(self, parts=self.parts.without_language())

    @property
    def _liger(self) -> bool:
        return self.impl == "local" and self.kernels == "triton"

    @property
    def _by_segments(self) -> bool:
        """PyTorch's attention on each segment: keys and values are copied for every query head, and the outputs are put
        together for the projection, which else keeps the core's own output."""
        return self.attention == "packed" and self.kernels == "torch"

    @property
    def repeats_encoders(self) -> bool:
        """Whether the encoders' layers are computed again."""
        return self.recompute in ("full", "offload") and self.recompute_layers is None

    @property
    def number(self) -> int:
        """Bytes of one activation."""
        return 2 if self.precision == "bf16" else 4

    def hidden(self, pack: PackShape) -> float:
        """Hidden states between layers, as a process holds or sends them."""
        language = self.config.language
        return self._tokens(pack) / self._split * language.hidden_size * self.number

    def embedding(self, pack: PackShape) -> float:
        """Embeddings, whole along the sequence, beside those that have been overwritten with features."""
        return self._tokens(pack) * self.config.language.hidden_size * self.number

    def layer(self, pack: PackShape) -> Held:
        """One decoder layer."""
        whole = self._layer_saved(pack)
        moment = self.hidden(pack) + self._mlp_moment(pack)
        if self.recompute == "offload":  # the layers' inputs are kept by the host
            return Held(0.0, whole, whole + moment + 3 * self.hidden(pack))
        if self.recompute == "full":
            own = self.hidden(pack)  # its input; and while it is repeated, its output and that of the last layer
            return Held(own, whole, whole + moment + own)
        if self.recompute == "selective":
            core = self._core_saved(pack)
            # The projection keeps its input. Where that is the core's own output, it goes with ``core`` and is added.
            inputs = self._core_inputs(pack) + self._core_output(pack) * (not self._by_segments)
            return Held(whole - core + inputs, core, max(core, moment))
        return Held(whole, 0.0, moment)

    def head(self, pack: PackShape) -> Held:
        """The last norm, the logits and their cross entropy."""
        if self.kernels == "triton":
            return self._head_in_kernel(pack)
        language, tokens = self.config.language, self._tokens(pack)
        logits = tokens * language.padded_vocab_size / self.layout.tp
        embedding = language.hidden_size * language.padded_vocab_size / self.layout.tp * self.number
        copied = self.precision == "bf16" or language.padded_vocab_size != language.vocab_size
        weight_gradient = embedding if self._learns else 0.0
        # The gradient of the norm's output comes whole and, with sequence parallelism, is then summed into its part.
        whole = self.embedding(pack) * (self._split > 1)
        scratch = 28 * tokens  # targets, masks and maxima
        return Held(
            self._norm(pack, float(self._learns)) + 4 * logits + scratch,
            logits * self.number if self.precision == "bf16" else 0.0,
            max(copied * logits * self.number, weight_gradient + whole + self.hidden(pack)),
        )

    def _head_in_kernel(self, pack: PackShape) -> Held:
        """The same where gradients are made with the loss: they wait for the backward pass, the logits do not."""
        language, tokens = self.config.language, self._tokens(pack)
        columns = language.padded_vocab_size / self.layout.tp
        rows = min(tokens, ROWS_OF_LOGITS)
        weight = columns * language.hidden_size if self._learns else 0.0
        whole = self.embedding(pack)  # hidden states and their gradient are whole, even with sequence parallelism
        chunk = rows * (columns + 2 * language.hidden_size) * self.number
        gathered = whole if self._split > 1 else 0.0
        norm = self._norm(pack, 0.0)  # no product behind it needs its output
        saved = norm + whole + 4 * weight + 8 * tokens
        return Held(saved, chunk + gathered, whole + weight * self.number + self.hidden(pack))

    def tied_gradient(self) -> tuple[float, float]:
        """(from the output layer's backward pass on, at the end of the embedding's) for a weight that is both: the one
        gradient waits for the other, and then there are both and their sum."""
        language = self.config.language
        if not (language.tie_word_embeddings and self._learns):
            return 0.0, 0.0
        one = language.hidden_size * language.padded_vocab_size / self.layout.tp * self.number
        return one, 3 * one

    def messages_ahead(self, pack: PackShape) -> float:
        """Interleaved stages take the next message while they compute and have the last one still on its way, in both
        directions."""
        return 4 * self.hidden(pack) if self.layout.vpp else 0.0

    def _tokens(self, pack: PackShape) -> float:
        return pack.length / self.layout.cp

    @property
    def _split(self) -> int:
        return self.layout.tp if self.layout.sequence_parallel else 1

    @property
    def _inner(self) -> float:
        return self.config.language.intermediate_size / self.layout.tp

    @property
    def _learns(self) -> bool:
        """Whether the language model's weights have gradients."""
        return self.parts.learns_weights("language")

    def _kept(self, layer: str) -> float:
        """How often what a linear layer is given is kept for its weights' gradient, or its adapter's; with dropout that
        is the mask and what is left."""
        part = layer.partition(".")[0]
        if self.parts.adapts(layer):
            assert self.parts.lora is not None
            return 2.0 if self.parts.lora.dropout else 1.0
        return float(self.parts.learns_weights(part))

    def _norm(self, pack: PackShape, outputs: float) -> float:
        """A norm, and its output ``outputs`` times, which the product behind it needs."""
        width = self._tokens(pack) / self._split * self.config.language.hidden_size
        kept = width * self.number * (1 + outputs)
        if self.impl == "transformer_engine":
            return kept
        if self._liger:
            return kept + 4 * self._tokens(pack) / self._split
        return width * (4 + self.number * (self._learns + outputs)) + 4 * self._tokens(pack) / self._split

    def _layer_saved(self, pack: PackShape) -> float:
        tokens, trains = self._tokens(pack), self._kept("language.fc2")
        project = self._core_output(pack) * self._by_segments
        if self.impl == "transformer_engine":
            mlp = 3 + trains
        elif self._liger:
            mlp = 2 + trains  # gate and up, and the product's input
        else:
            mlp = 4 + trains
        norms = self._norm(pack, self._kept("language.qkv")) + self._norm(pack, self._kept("language.fc1"))
        own = norms + self._core_saved(pack) + project + tokens * self._inner * self.number * mlp
        return own + self._adapters_saved(pack)

    def _adapters_saved(self, pack: PackShape) -> float:
        """Between A and B, and B with its zeros where a layer is several matrices."""
        total = 0.0
        for place, shape in language_adapters(self.config.language, self.parts).items():
            split = self._split if place in ("proj", "fc2") else 1
            columns = shape.matrices * (self.parts.lora.rank if self.parts.lora else 0)
            total += self._tokens(pack) / split * columns
            total += shape.outputs / self.layout.tp * columns * (shape.matrices > 1)
        return total * self.number

    def _core_output(self, pack: PackShape) -> float:
        """What the projection behind the attention core keeps for its weights (Transformer Engine's, too: 2.11's
        ``_Linear.forward`` saves its input if the weight has a gradient)."""
        heads = self.config.language.hidden_size / self.layout.tp
        return self._tokens(pack) * heads * self.number * self._kept("language.proj")

    def _mlp_moment(self, pack: PackShape) -> float:
        """Beside the hidden states' gradient, where the backward pass of a layer has most: around its SwiGLU."""
        inner = self._inner * self.number
        if not self._liger:
            return 2 * self._tokens(pack) * inner
        # Liger's gradient overwrites gate and up, so the most is before it, or behind it the first product's weights'.
        weights = self.config.language.hidden_size * inner * self._learns
        return max(self._tokens(pack) * inner + weights, self.hidden(pack) + 2 * weights)

    def _core_saved(self, pack: PackShape) -> float:
        """Queries, the whole pack's keys and values, the output, and the rotary table that turned them (Liger's is one
        for all layers)."""
        language, tokens, length = self.config.language, self._tokens(pack), pack.length
        heads = language.hidden_size / self.layout.tp
        keys = heads if self._by_segments else self._key_channels
        rotary = 0.0 if self._liger else 4 * tokens * language.head_dim * self.number
        places = length / self.layout.ulysses if self.layout.cp > 1 else tokens
        exchanged = tokens * heads * self.number if self.layout.ulysses > 1 else 0.0
        saved = (2 * tokens * heads + 2 * places * keys) * self.number + rotary + exchanged
        saved += 4 * tokens * language.num_attention_heads / self.layout.tp
        return saved + (self._masks(pack) if self._makes_masks else 0.0)

    def _core_inputs(self, pack: PackShape) -> float:
        """What recomputing the attention core starts from: queries, keys, and the product that values are a view of."""
        heads = self.config.language.hidden_size / self.layout.tp
        values = heads + 2 * self._key_channels if self.kernels == "torch" else self._key_channels
        rotary = 0.0 if self._liger else 4 * self.config.language.head_dim
        return self._tokens(pack) * (heads + self._key_channels + values + rotary) * self.number

    @property
    def _key_channels(self) -> float:
        language = self.config.language
        return max(1.0, language.num_key_value_heads / self.layout.tp) * language.head_dim

    def shape_held(self, pack: PackShape) -> PackShape:
        """A pack that holds as much; where no masks are made, whatever its segments."""
        return pack if self._makes_masks else PackShape((pack.length,), pack.tiles)

    @property
    def _makes_masks(self) -> bool:
        return self.kernels == "torch" and self.layout.cp > 1

    def _masks(self, pack: PackShape) -> float:
        """Masks that PyTorch's attention on a CPU is given for pieces that start inside a segment (first place)."""
        borders = [sum(pack.segments[:number]) for number in range(len(pack.segments) + 1)]
        share = ContextShard(self.layout.ring, self.layout.ulysses, 0)
        masked = [p for p in pieces(borders, share.runs(pack.length)) if not p.starts_segment]
        assert all(p.rows.stop - p.rows.start <= MASKED_QUERIES for p in masked)
        area = sum((p.rows.stop - p.rows.start) * (p.keys.stop - p.keys.start) for p in masked)
        return area * self.number

    @cached_property
    def tile(self) -> Held:
        """Encoders and connector on one tile; kept, for a search asks of each of thousands of packs."""
        return self.vision_tile().then(self.connector_tile())

    def connector_tile(self) -> Held:
        """The connector on one tile; its output is counted as ``feature``."""
        tokens, hidden = tokens_per_tile(self.config), self.config.language.hidden_size / self.encoder_tp
        channels, trains = mixture_channels(self.config), self.parts.connector
        if not (trains or self.parts.vision):
            return Held(0.0, tokens * (2 * channels + 2 * hidden) * self.number)
        inputs = channels * self._kept("connector.fc1") + hidden * self._kept("connector.fc2")
        saved = tokens * (channels + hidden + inputs) * self.number + 8 * tokens
        return Held(saved, 0.0, tokens * channels * self.number)

    def feature(self) -> float:
        """What one tile becomes for the language model."""
        return tokens_per_tile(self.config) * self.config.language.hidden_size * self.number

    def vision_tile(self) -> Held:
        """All encoders on one tile, one after another."""
        run = EncoderRun(
            number=self.number,
            tp=self.encoder_tp,
            trains=self.parts.vision,
            repeats_layers=self.repeats_encoders,
            in_kernel=self.kernels == "triton" and kernels_take(self.config),
            adapters=self.parts.lora is not None and "vision" in self.parts.lora.parts,
        )
        total = Held()
        for name, settings in zip(encoder_names(self.config), self.config.encoders, strict=True):
            trains = run.trains and self._encoder_learns(name)
            own = replace(run, trains=trains)
            total = total.then(encoder_cost(settings).activations(encoder_config(settings), own))
        return total

    def _encoder_learns(self, name: str) -> bool:
        """Whether anything of an encoder trains; one that is frozen in part is counted as if all of it did."""
        own = [one for one in self.parts.frozen if one.tower.name == f"vision.{name}"]
        return not own or bool(learning_layers(own[0].tower, own))

    @property
    def encoder_tp(self) -> int:
        """Processes that share one encoder's weights."""
        return 1 if self.layout.encoder == "spread" else self.layout.tp


def _all_of(layers: Sequence[tuple[Held, int]]) -> Held:
    """Layers of a few kinds, each so many times, in any order."""
    return Held(
        sum(layer.saved * count for layer, count in layers),
        max((layer.forward for layer, _ in layers), default=0.0),
        max((layer.backward for layer, _ in layers), default=0.0),
    )
