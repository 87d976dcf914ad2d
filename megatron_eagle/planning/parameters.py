"""The weights that each process of a job holds, and where its gradients and optimizer states lie, to the byte.

Shapes come from the model itself, built once on the meta device, so a new encoder is counted without a line here. How
they are laid out follows megatron-core 0.16.1 (``_ParamAndGradBuffer``): parameters in reverse order, aligned to 64
elements, in buckets padded so that they can be cut among the processes that share them. ``walk.py`` and the tests
compare the result with what Megatron allocates.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from pydantic import TypeAdapter

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig, check_layout
from megatron_eagle.model.cost import Parts

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
SMALLEST_BUCKET = 40_000_000  # elements; Megatron's default where gradients are reduced during the backward pass
BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True)
class Weight:
    """One parameter as a process holds it. shared: a tied embedding that two pipeline stages hold."""

    name: str
    elements: int
    shared: bool = False


@dataclass(frozen=True)
class Buffer:
    """How trained weights lie in a gradient buffer.

    places: (first, last + 1) element of each weight; buckets: the same of each bucket, padding included.
    """

    places: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        return self.buckets[-1][1] if self.buckets else 0

    def shard(self, rank: int, ranks: int) -> int:
        """Elements whose optimizer state the ``rank``-th of ``ranks`` processes keeps, padding left out."""
        kept = 0
        for first, last in self.buckets:
            share = (last - first) // ranks
            start, stop = first + rank * share, first + (rank + 1) * share
            kept += sum(max(0, min(stop, b) - max(start, a)) for a, b in self.places if a < stop and b > start)
        return kept


def layers_of_chunks(config: EagleConfig, layout: Layout) -> list[int]:
    """Decoder layers of every virtual stage, in the order in which they are run."""
    count = layout.pp * (layout.vpp or 1)
    return list(layout.layers_per_stage or [config.language.num_hidden_layers // count] * count)


def chunks_of_stage(layout: Layout, pp_rank: int) -> list[int]:
    """The virtual stages that the ``pp_rank``-th pipeline stage runs, by their place in the order of layers."""
    return [chunk * layout.pp + pp_rank for chunk in range(layout.vpp or 1)]


def stage_weights(
    config: EagleConfig, layout: Layout, pp_rank: int, lora: LoraSettings | None = None
) -> list[list[Weight]]:
    """Weights of one process, by virtual stage, in Megatron's order, with the adapters of ``lora``; without spread
    encoders' copies."""
    check_layout(config, layout)
    layers, last = layers_of_chunks(config, layout), layout.pp * (layout.vpp or 1) - 1
    chunks = []
    for number in chunks_of_stage(layout, pp_rank):
        start = sum(layers[:number])
        names = range(start, start + layers[number])
        chunks.append(_chunk(config, layout, lora, names, first=number == 0, last=number == last))
    return chunks


def encoder_copy(config: EagleConfig, lora: LoraSettings | None = None) -> list[Weight]:
    """Weights of a whole copy of encoders and connector, which ``encoder: spread`` gives every process."""
    return [Weight(name, full) for name, full, _ in _whole_model(config, lora) if not name.startswith("language.")]


def gradient_buffer(
    weights: Sequence[Weight], parts: Parts, ranks: int, *, distributed: bool, bucket: int | None
) -> Buffer:
    """The buffer of those of ``weights`` that train. bucket: elements after which a new one begins, None for one."""
    trained = [weight for weight in weights if parts.learns(weight.name)]
    align = PARAMETER_ALIGNMENT if distributed else 1
    multiple = math.lcm(ranks, BUCKET_ALIGNMENT) if distributed else 1
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    position = opened = filled = 0
    for weight in reversed(trained):
        position = _up(position, align)
        alone = weight.shared and distributed
        if alone and filled:
            buckets.append((opened, _up(position, multiple)))
            opened = position = buckets[-1][1]
        places.append((position, position + weight.elements))
        position += weight.elements
        filled += 1
        if alone or (bucket is not None and position - opened >= bucket):
            buckets.append((opened, _up(position, multiple)))
            opened, position, filled = buckets[-1][1], buckets[-1][1], 0
    if filled:
        buckets.append((opened, _up(position, multiple)))
    return Buffer(tuple(places), tuple(buckets))


def bucket_size(*, overlap: bool, ranks: int, pp_rank: int, chunk: int) -> int | None:
    """Elements of a bucket as Megatron chooses them: only the first stage's first chunk has several."""
    if not overlap or pp_rank > 0 or chunk > 0:
        return None
    return max(SMALLEST_BUCKET, BUCKET_PER_RANK * ranks)


def _up(position: int, multiple: int) -> int:
    return math.ceil(position / multiple) * multiple


def _chunk(
    config: EagleConfig, layout: Layout, lora: LoraSettings | None, layers: range, *, first: bool, last: bool
) -> list[Weight]:
    tied = config.language.tie_word_embeddings
    chunk, embedding = [], 0
    for name, full, split in _whole_model(config, lora):
        elements = full // layout.tp if split else full
        part, _, rest = name.partition(".")
        if part != "language":
            wanted = first and layout.encoder == "tensor"
        elif rest.startswith("embedding."):
            embedding, wanted = elements, first
        elif rest.startswith("decoder.layers."):
            wanted = int(rest.split(".")[2]) in layers
        else:  # the last norm and the output layer
            wanted = last
        if wanted:
            chunk.append(Weight(name, elements, shared=tied and not last and rest.startswith("embedding.")))
    if tied and last and not first:
        chunk.append(Weight("language.output_layer.weight", embedding, shared=True))
    return chunk


@lru_cache(maxsize=64)
def _model_weights(key: str, lora: LoraSettings | None) -> tuple[tuple[str, int, bool], ...]:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_eagle.model.build_context import BuildContext
    from megatron_eagle.model.eagle import EagleModel, _Alone
    from megatron_eagle.model.lora import adapted_layers, attach, check_targets
    from megatron_eagle.model.weights import weight_slices

    config = _from_key(key)
    alone = _Alone()
    groups = ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=None)
    with torch.device("meta"):
        model = EagleModel(config, BuildContext(Layout(), groups), pre_process=True, post_process=True)
        if lora:
            attach(model, lora, alone, seed=None)
            check_targets(lora, adapted_layers(model))
    return tuple((w.name, w.parameter.numel(), w.dim is not None) for w in weight_slices(model, alone))


def _whole_model(config: EagleConfig, lora: LoraSettings | None) -> tuple[tuple[str, int, bool], ...]:
    """(name, elements, whether tensor parallelism splits it) of every weight of the undivided model."""
    return _model_weights(_as_key(config), lora)


_CONFIG = TypeAdapter(EagleConfig)


def _as_key(config: EagleConfig) -> str:
    """Configs hold dictionaries, which caches cannot take."""
    return json.dumps(asdict(config), sort_keys=True)


@lru_cache(maxsize=64)
def _from_key(key: str) -> EagleConfig:
    return _CONFIG.validate_json(key)
