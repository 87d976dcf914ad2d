"""What pieces of a model cost, as numbers: operations (``Flops``) and bytes (``Held``), and what they depend on.

The encoders' ``cost.py`` state their own in these terms, ``flops.py`` and the planner those of everything else. Numbers
only, importable without torch.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from megatron_eagle.config.layers import Frozen
from megatron_eagle.config.lora import LoraSettings, is_adapter

Rate = Literal["products", "convolutions"]
"""The share of the peak that an operation runs at: a field of ``planning.hardware.Hardware``."""


@dataclass(frozen=True)
class Flops:
    """Operations of one part: forward, gradient of its inputs, gradient of its weights."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.forward * times, self.input_gradient * times, self.weight_gradient * times)


# Tensors with a row for each token, and what else of the language model is outside its layers.
ROWS = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")
LAST_NORM = "language.decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Parts:
    """Which parts of a model train, hence which gradients a step needs.

    lora: their adapters alone train. frozen: layers of them that do not. new_rows: outside its layers, the language
    model trains rows of new tokens alone; their tensors count whole.
    """

    vision: bool
    connector: bool
    language: bool
    lora: LoraSettings | None = None
    frozen: tuple[Frozen, ...] = ()
    new_rows: bool = False

    @staticmethod
    def of(
        trainable: Collection[str],
        lora: LoraSettings | None = None,
        frozen: tuple[Frozen, ...] = (),
        new_rows: bool = False,
    ) -> "Parts":
        return Parts("vision" in trainable, "connector" in trainable, "language" in trainable, lora, frozen, new_rows)

    def learns(self, weight: str) -> bool:
        """Whether a parameter, by its global name, has a gradient."""
        trains: bool = getattr(self, weight.partition(".")[0])
        if not trains or (self.new_rows and weight == LAST_NORM) or any(one.holds(weight) for one in self.frozen):
            return False
        return self.lora is None or is_adapter(weight)

    def without_language(self) -> "Parts":
        """The same with the language model frozen as a whole."""
        return replace(self, language=False)

    def learns_weights(self, part: str) -> bool:
        """Whether ``part`` trains, and not by adapters."""
        return self.lora is None and getattr(self, part)

    def adapts(self, layer: str) -> bool:
        """Whether a layer, named as among LoRA's targets, has an adapter that trains."""
        return self.lora is not None and getattr(self, layer.partition(".")[0]) and self.lora.wants(layer)

    @property
    def features_need_gradient(self) -> bool:
        return self.vision or self.connector

    @property
    def any(self) -> bool:
        return self.vision or self.connector or self.language


@dataclass(frozen=True)
class Held:
    """Bytes of one piece of model: ``saved`` from forward to backward, and what each pass needs beyond that."""

    saved: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    def then(self, after: "Held") -> "Held":
        """This piece and the one behind it. While this one runs, forward or backward, the other holds nothing."""
        return Held(
            self.saved + after.saved,
            max(self.forward - after.saved, after.forward),
            max(self.backward - after.saved, after.backward),
        )

    def times(self, count: float) -> "Held":
        return Held(self.saved * count, self.forward * count, self.backward * count)


@dataclass(frozen=True)
class EncoderRun:
    """How an encoder runs, as far as its bytes depend on it.

    number: bytes of one activation. tp: processes that share its weights. trains: whether it does; if not, nothing is
    saved. repeats_layers: whole layers are computed again in the backward pass. in_kernel: its pixels are prepared by a
    kernel, without copies in float32. adapters: it has LoRA's, which alone train, so that what the weights'
    gradients need, and all in front of the first adapter, is not saved; but a layer's output is there three times for a
    moment, as is its input's gradient: the base's, the adapter's, and their sum.
    """

    number: int
    tp: int
    trains: bool
    repeats_layers: bool
    in_kernel: bool
    adapters: bool = False

    def pixels(self, count: float, copies: int) -> Held:
        """The prepared pixels, ``count`` numbers; preparing them holds ``copies`` copies in float32 at a time."""
        kept = count * self.number
        if self.adapters:
            return Held(0.0, kept if self.in_kernel else copies * count * 4.0)
        return Held(kept, (kept if self.in_kernel else copies * count * 4.0) - kept)
