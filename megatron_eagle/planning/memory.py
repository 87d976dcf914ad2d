"""Bytes on every process of a job: what stays, what comes and goes, and where in the schedule the peak is.

Walks one step in the order of ``schedule.py``: a forward pass adds what its microbatch saves, a backward pass takes it
off again, and both need something on top. What a process holds all the time - weights, gradients, optimizer states - is
exact (``parameters.py``); the rest follows ``activations.py``. ``tests/planning/test_memory.py`` compares both with
what is really allocated.

Not counted, because it is not tensors: the CUDA context, NCCL's buffers and the allocator's fragmentation. The hardware
profile states an allowance for them (``hardware.py``).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from pydantic import TypeAdapter

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import packed_bytes
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.model.cost import Held, Parts
from megatron_eagle.parallel.shard_tiles import TileShards
from megatron_eagle.planning.activations import Activations, PackShape, stage_parts
from megatron_eagle.planning.parameters import (
    Buffer,
    bucket_size,
    chunks_of_stage,
    encoder_copy,
    gradient_buffer,
    layers_of_chunks,
    stage_weights,
)
from megatron_eagle.planning.schedule import passes

BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4  # gradients are summed in float32
INPUT_BYTES_PER_TOKEN = 3 * 8 + 4  # tokens, labels, positions; loss weights


@dataclass(frozen=True)
class ProcessRanks:
    """A process by its ranks, those that matter for memory. replica_rank: among the processes of its replica."""

    pp: int
    dp_cp: int = 0
    replica: int = 0
    world: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    weights, gradients, optimizer: held all the time. inputs: the step's packs and tiles. activations: the most that
    the step adds, at ``peak_at``. update: the most that the optimizer's step adds.
    """

    weights: float
    gradients: float
    optimizer: float
    inputs: float
    activations: float
    update: float
    peak_at: str

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.inputs + max(self.activations, self.update)


@dataclass(frozen=True)
class _Owned:
    """Weights of one data-parallel wrapper: all of them, and the buffer of those that train, shared by ``ranks``.

    packed: elements of each weight that is kept packed, which are not among ``elements``.
    """

    elements: int
    trained: int
    buffer: Buffer
    ranks: int
    copy: bool = False
    packed: tuple[int, ...] = ()


def memory_of(recipe: Recipe, stage: Stage, world_size: int, place: ProcessRanks, packs: Sequence[PackShape]) -> Memory:
    """Memory of the process at ``place`` while its replica trains on ``packs``."""
    sizes = Activations.of(recipe, stage)
    weights, gradients, optimizer, update = persistent(recipe, stage, world_size, place)
    activations, where = _walk(sizes, place, packs)
    activations += unpacked(recipe, stage, world_size, place)
    side = sizes.config.tile_size
    tiles = _tiles_held(sizes, place, packs)
    inputs = sum(pack.length for pack in packs) * INPUT_BYTES_PER_TOKEN + 3 * side**2 * tiles
    scratch = update if recipe.model.transformer_impl == "local" else 0.0
    return Memory(weights, gradients, optimizer, inputs, activations, scratch, where)


def persistent(recipe: Recipe, stage: Stage, world_size: int, place: ProcessRanks) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, scratch of an unfused Adam) of a process, exact."""
    number, settings = BYTES[recipe.weight_precision], recipe.optimizer
    weights = gradients = states = largest = 0
    layout, config, parts = recipe.stage_layout(stage), recipe.model.eagle(), stage_parts(recipe, stage)
    key = json.dumps(asdict(config), sort_keys=True)
    for owned in _owned(key, layout, parts, settings.distributed, settings.overlap, world_size, place.pp):
        in_buffer = settings.distributed and owned.buffer.elements
        weights += (owned.elements - owned.trained + owned.buffer.elements if in_buffer else owned.elements) * number
        weights += sum(packed_bytes(elements) + number for elements in owned.packed)  # and one number in its place
        gradients += owned.buffer.elements * GRADIENT_BYTES
        rank = place.world if owned.copy else place.dp_cp
        kept = owned.buffer.shard(rank, owned.ranks) if settings.distributed else owned.trained
        states += kept * (12 if number == 2 else 8)  # two moments, and float32 weights beside bf16 ones
        states += kept * 4 * (stage.ema is not None)
        largest = max(largest, kept)
    return weights, gradients, states, largest * 4


def unpacked(recipe: Recipe, stage: Stage, world_size: int, place: ProcessRanks) -> int:
    """Bytes of the largest packed weight while a pass multiplies with it."""
    layout, key = recipe.stage_layout(stage), json.dumps(asdict(recipe.model.eagle()), sort_keys=True)
    settings, parts = recipe.optimizer, stage_parts(recipe, stage)
    owned = _owned(key, layout, parts, settings.distributed, settings.overlap, world_size, place.pp)
    return BYTES[recipe.weight_precision] * max((each for one in owned for each in one.packed), default=0)


def gradient_buffers(recipe: Recipe, stage: Stage, world_size: int, pp_rank: int) -> list[tuple[int, int, bool]]:
    """(elements, processes that share them, whether it is that of spread encoders) of each gradient buffer."""
    config, layout, settings = recipe.model.eagle(), recipe.stage_layout(stage), recipe.optimizer
    key, parts = json.dumps(asdict(config), sort_keys=True), stage_parts(recipe, stage)
    all_owned = _owned(key, layout, parts, settings.distributed, settings.overlap, world_size, pp_rank)
    return [(owned.buffer.elements, owned.ranks, owned.copy) for owned in all_owned if owned.buffer.elements]


@lru_cache(maxsize=4096)
def _owned(
    key: str, layout: Layout, parts: Parts, distributed: bool, overlap: bool, world_size: int, pp_rank: int
) -> tuple[_Owned, ...]:
    """key: the model's config as JSON, which a cache can take."""
    config = TypeAdapter(EagleConfig).validate_json(key)
    ranks = layout.data_parallel_size(world_size) * layout.cp
    wrappers = []
    for chunk, weights in enumerate(stage_weights(config, layout, pp_rank, parts.lora)):
        bucket = bucket_size(overlap=overlap, ranks=ranks, pp_rank=pp_rank, chunk=chunk)
        wrappers.append((weights, ranks, bucket, False))
    if layout.encoder == "spread":
        wrappers.append((encoder_copy(config, parts.lora), world_size, None, True))
    packs = parts.lora.packs if parts.lora else lambda name: False
    return tuple(
        _Owned(
            elements=sum(weight.elements for weight in weights if not packs(weight.name)),
            trained=sum(weight.elements for weight in weights if parts.learns(weight.name)),
            buffer=gradient_buffer(weights, parts, count, distributed=distributed, bucket=bucket),
            ranks=count,
            copy=copy,
            packed=tuple(weight.elements for weight in weights if packs(weight.name)),
        )
        for weights, count, bucket, copy in wrappers
    )


def _tiles_held(sizes: Activations, place: ProcessRanks, packs: Sequence[PackShape]) -> int:
    total = sum(pack.tiles for pack in packs)
    if sizes.layout.encoder == "spread":
        return TileShards.of(total, sizes.layout.model_parallel_size).per_rank[place.replica]
    return total if place.pp == 0 else 0


def _walk(sizes: Activations, place: ProcessRanks, packs: Sequence[PackShape]) -> tuple[float, str]:
    """The most that a step adds, and where."""
    layout = sizes.layout
    peak, where, live = 0.0, "forward of pack 1", sizes.messages_ahead(packs[0])
    if layout.encoder == "spread":
        kept, peak, where = _encode(sizes, place, packs)
        live += kept
    shapes = [sizes.shape_held(pack) for pack in packs]
    held = {
        (shape, chunk): _microbatch(sizes, place.pp, chunk, shape)
        for shape in set(shapes)
        for chunk in range(layout.vpp or 1)
    }
    in_flight = 0
    for event in passes(layout.pp, layout.vpp, place.pp, len(packs)):
        own = held[shapes[event.microbatch], event.chunk]
        if event.kind == "forward":
            in_flight += 1
            live += own.saved
            moment = live + own.forward
        else:
            moment = live + own.backward
            live -= own.saved
        if moment > peak:
            peak, where = moment, f"{event.kind} of pack {event.microbatch + 1}, {in_flight} in flight"
        in_flight -= event.kind == "backward"
    return peak, where


def _encode(sizes: Activations, place: ProcessRanks, packs: Sequence[PackShape]) -> tuple[float, float, str]:
    """(kept through the pipeline, peak, where) of spread encoders' forward and backward."""
    total = sum(pack.tiles for pack in packs)
    own, trains = _tiles_held(sizes, place, packs), sizes.parts.features_need_gradient
    chunk = min(own, sizes.layout.encoder_chunk or own)
    again = sizes.layout.encoder_chunk is not None and sizes.parts.vision
    tile = sizes.tile
    home = total * sizes.feature() if place.pp == 0 else 0.0
    mine = own * sizes.feature()
    kept = home + (0.0 if again or not trains else own * tile.saved + mine)
    forward = kept + chunk * tile.forward + (chunk * tile.saved if again else 0.0) + mine
    gradients = home * trains
    backward = kept + gradients + mine + chunk * (tile.backward + (tile.saved if again else 0.0))
    if trains and backward > forward:
        return kept, backward, "backward of the spread encoders"
    return kept, forward, "encoding, before the pipeline"


def _microbatch(sizes: Activations, pp_rank: int, chunk: int, pack: PackShape) -> Held:
    if sizes.layout.least_cp:
        sizes = sizes.shared_by(sizes.layout.least_cp)  # who holds the most
    layout = sizes.layout
    place, count = chunks_of_stage(layout, pp_rank)[chunk], layout.pp * (layout.vpp or 1)
    counts = layers_of_chunks(sizes.config, layout)
    start = sum(counts[:place])
    layers = whole = sizes.layers(range(start, start + counts[place]), pack)
    if place == 0:
        whole = _first(sizes, pack).then(whole)
    if place == count - 1:
        head = sizes.of_head().head(pack)
        whole = whole.then(head)
        waiting, both = sizes.of_head().tied_gradient() if place == 0 else (0.0, 0.0)
        # Beyond what is saved, and by then none of that is left: the head's own backward pass counts its gradient.
        behind_head = whole.saved - head.saved + waiting + layers.backward
        return Held(whole.saved, whole.forward, max(whole.backward, behind_head - whole.saved, both - whole.saved))
    hidden = sizes.hidden(pack)  # the output, kept until its gradient has come back
    return Held(whole.saved + hidden, whole.forward, whole.backward + hidden)


def _first(sizes: Activations, pack: PackShape) -> Held:
    """What the first stage does before its layers."""
    embedding = sizes.embedding(pack)
    if sizes.layout.encoder == "spread" or not pack.tiles:
        return Held(0.0, embedding, embedding)
    tiles = sizes.tile.times(pack.tiles)
    return Held(tiles.saved, tiles.forward + embedding, tiles.backward + embedding)
