"""PassTime for every pass of every pipeline stage, from operation counts, bytes and the rates of a hardware profile.

Products, attention and convolutions run at different shares of the peak; element-wise work (norms, activations, the
cross entropy) runs at the speed of memory; tensor parallelism waits for its exchanges. Work that is repeated in the
backward pass costs time here and counts nowhere else. Reading data is taken to keep up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.model import encoder_names
from megatron_eagle.model.cost import Flops
from megatron_eagle.model.encoders import encoder_cost
from megatron_eagle.model.flops import attention_flops, connector_flops, encoder_flops, head_flops, layer_flops
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.parameters import layers_of_chunks

ADAM_BYTES = 30  # per weight of a shard: read gradient, weight and two moments, write three of them and the bf16 copy
HIDDEN_BY_BACKWARD = 0.8  # of gradient sums with optimizer.overlap; an assumption
ELEMENTWISE_PASSES = (2.0, 3.0)  # over what is saved: written and read forward, read and two gradients backward


@dataclass(frozen=True)
class PassTime:
    """Forward and backward of a piece."""

    forward: float
    backward: float

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "PassTime":
        return PassTime(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Timing:
    """Times of the pieces of a model on one process of a layout."""

    sizes: Activations
    hardware: Hardware

    def layer(self, pack: PackShape) -> PassTime:
        """One decoder layer on a whole pack, with its exchanges and what is computed again."""
        language, layout, parts = self.sizes.config.language, self.sizes.layout, self.sizes.parts
        work, share = pack.computed(), layout.tp * layout.cp
        products = self._compute(layer_flops(language, parts, work.tokens) * (1 / share), self.hardware.products)
        core = self._compute(attention_flops(language, parts, work.pairs) * (1 / share), self.hardware.attention)
        kept = replace(self.sizes, recompute="none", impl="transformer_engine", kernels="triton")
        rest = self._elementwise(kept.layer(pack).saved)
        exchange = self._tensor_exchange(pack) + self._context_exchange(pack)
        once = products + core + rest + exchange
        if self.sizes.recompute == "selective":
            once = PassTime(once.forward, once.backward + core.forward)
        elif self.sizes.recompute in ("full", "offload"):
            once = PassTime(once.forward, once.backward + once.forward)
        return self._launched(once, 1)

    def head(self, pack: PackShape) -> PassTime:
        """Logits and cross entropy."""
        language, layout = self.sizes.config.language, self.sizes.layout
        tokens = pack.length / layout.cp
        products = self._compute(
            head_flops(language, self.sizes.parts, tokens) * (1 / layout.tp), self.hardware.products
        )
        return products + self._elementwise(4.0 * tokens * language.padded_vocab_size / layout.tp * 2)

    def tiles(self, count: int) -> PassTime:
        """Encoders and connector on ``count`` tiles; every context-parallel process of a place encodes all of them."""
        if not count:
            return PassTime(0.0, 0.0)
        config, parts, tp = self.sizes.config, self.sizes.parts, self.sizes.encoder_tp
        total = self._compute(connector_flops(config, parts) * (count / tp), self.hardware.products)
        layers = 0
        for name, settings in zip(encoder_names(config), config.encoders, strict=True):
            cost = encoder_cost(settings)
            flops = encoder_flops(settings, parts, name) * (count / tp)
            one = self._compute(flops, getattr(self.hardware, cost.RATE))
            repeats = self.sizes.repeats_encoders and parts.vision
            total += PassTime(one.forward, one.backward + one.forward * repeats)
            layers += cost.layers(encoder_config(settings))
        if self.sizes.layout.encoder_chunk is not None and parts.vision:
            total = PassTime(total.forward, total.backward + total.forward)
        if not parts.vision:  # the connector's backward pass is short
            return PassTime(self._launched(total, layers).forward, total.backward * parts.features_need_gradient)
        return self._launched(total, layers)

    def table(self, stage: int, packs: Sequence[PackShape]) -> list[PassTime]:
        """A virtual stage's passes over each of ``packs``."""
        layout = self.sizes.layout
        layers = layers_of_chunks(self.sizes.config, layout)
        own = range(sum(layers[:stage]), sum(layers[: stage + 1]))
        kinds = [(replace(self, sizes=sizes), count) for sizes, count in self.sizes.by_kind(own)]
        times = []
        for pack in packs:
            total = sum((kind.layer(pack) * count for kind, count in kinds), PassTime(0.0, 0.0))
            if stage == len(layers) - 1:
                total += replace(self, sizes=self.sizes.of_head()).head(pack)
            if stage == 0 and layout.encoder == "tensor":
                total += self.tiles(pack.tiles)
            times.append(total)
        return times

    def spread(self, own: int, total: int) -> float:
        """Everything that spread encoders add outside the pipeline, for a process with ``own`` of the step's tiles."""
        if not total:
            return 0.0
        size = self.sizes.layout.model_parallel_size
        link = self._link(size)
        side = self.sizes.config.tile_size
        pixels = 3.0 * side**2 * total * (size - 1) / size / link
        features = total * self.sizes.feature() / link * (2 if self.sizes.parts.features_need_gradient else 1)
        encode = self.tiles(own)
        return encode.forward + encode.backward + pixels + features + 3 * self.hardware.latency

    def transfer(self, pack: PackShape, gpus: int) -> float:
        """Hidden states from one pipeline stage to the next; neighbours are ``world / pp`` ranks apart."""
        link = self._link(self.sizes.layout.pp * gpus // max(1, self.sizes.layout.pp))
        return self.sizes.hidden(pack) / link + self.hardware.latency

    def gradients(self, size: float, ranks: int, stride: int, *, overlap: bool) -> float:
        """Gradient sums, or new weights, of ``size`` bytes: a ring over ``ranks`` processes, ``stride`` apart."""
        if ranks == 1:
            return 0.0
        seconds = size * (ranks - 1) / ranks / ring_rate(self.hardware, ranks, stride) + self.hardware.latency
        return seconds * (1 - HIDDEN_BY_BACKWARD if overlap else 1.0)

    def update(self, shard: float) -> float:
        """Adam over the ``shard`` weights a process keeps the state of."""
        return shard * ADAM_BYTES / (self.hardware.memory_bytes_per_second * self.hardware.memory_share)

    def _compute(self, flops: Flops, share: float) -> PassTime:
        rate = self.hardware.peak_flops * share
        return PassTime(flops.forward / rate, flops.backward / rate)

    def _launched(self, work: PassTime, layers: int) -> PassTime:
        """``work`` of ``layers`` layers with what starting it costs: once forward, twice backward."""
        start = self.hardware.launch * layers
        starts = PassTime(start, 2 * start if self.sizes.parts.any else 0.0)
        if self.hardware.launches_ahead:
            return PassTime(max(work.forward, starts.forward), max(work.backward, starts.backward))
        return work + starts

    def _elementwise(self, saved: float) -> PassTime:
        rate = self.hardware.memory_bytes_per_second * self.hardware.memory_share
        forward, backward = (passes * saved / rate for passes in ELEMENTWISE_PASSES)
        return PassTime(forward, backward if self.sizes.parts.any else 0.0)

    def _tensor_exchange(self, pack: PackShape) -> PassTime:
        """Two sums of the hidden states forward, two backward; with sequence parallelism the same bytes in halves, and
        the inputs gathered again for the weight gradients."""
        layout = self.sizes.layout
        if layout.tp == 1:
            return PassTime(0.0, 0.0)
        whole = self.sizes.embedding(pack)
        once = 2 * whole * (layout.tp - 1) / layout.tp / self._link(layout.tp) + self.hardware.latency
        again = 0.5 * (layout.sequence_parallel and self.sizes.parts.learns_weights("language"))
        return PassTime(2 * once, (2 + 2 * again) * once)

    def _context_exchange(self, pack: PackShape) -> PassTime:
        """Keys and values to all places, and their gradients back."""
        layout, language = self.sizes.layout, self.sizes.config.language
        if layout.cp == 1:
            return PassTime(0.0, 0.0)
        keys = 2 * pack.length * language.num_key_value_heads * language.head_dim / layout.tp * self.sizes.number
        once = keys * (layout.cp - 1) / layout.cp / self._link(layout.tp * layout.cp) + self.hardware.latency
        return PassTime(once, once)

    def _link(self, span: int) -> float:
        return link_rate(self.hardware, span)


def link_rate(hardware: Hardware, span: int) -> float:
    """Bytes a second between two processes whose ranks lie within ``span`` of each other."""
    inside = span <= hardware.gpus_per_node
    rate = hardware.inside_bytes_per_second if inside else hardware.outside_bytes_per_second
    return rate * hardware.link_share


def ring_rate(hardware: Hardware, ranks: int, stride: int) -> float:
    """Bytes a second at which a collective of large tensors moves through each of ``ranks`` members.

    Between nodes the members on one node share its adapters: rings run through all of them (NCCL's channels; the bus
    bandwidth of nccl-tests), up to what the links inside the node carry. stride: distance of neighbours in rank.
    """
    node = hardware.gpus_per_node
    if ranks * stride <= node:
        return link_rate(hardware, node)
    return min(link_rate(hardware, node + 1) * max(1, node // stride), link_rate(hardware, node))
