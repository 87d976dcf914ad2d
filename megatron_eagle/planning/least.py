"""What a step of a layout takes at the least, in a fraction of the time that planning it takes.

A pipeline stage cannot start before the first pack has come through the stages in front of it, it computes all of its
passes, and behind its last backward pass those stages still have one to run. Of that the most over all stages, for one
replica, as if its packs all cost as little as the cheapest but for their tiles, is no more than what ``plan_stage``
finds; waiting beyond that, gradient sums and the optimizer are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_eagle.config.layout import Layout
from megatron_eagle.parallel.shard_tiles import TileShards
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.parameters import chunks_of_stage, layers_of_chunks
from megatron_eagle.planning.timing import PassTime, Timing


@dataclass
class Least:
    """Bounds for one layout, whatever it computes again. packs: of the first replica that a plan draws."""

    timing: Timing
    packs: Sequence[PackShape]
    _layer: dict[Any, PassTime] = field(default_factory=dict)

    @cached_property
    def _cheapest(self) -> PackShape:
        return min(self.packs, key=lambda pack: pack.computed().pairs)

    def layers(self, layout: Layout) -> list[int]:
        """Decoder layers of each virtual stage."""
        return layers_of_chunks(self.timing.sizes.config, layout)

    def balanced(self, recompute: Any) -> Layout:
        """The layout with layers shared out so that the slowest stage is as fast as it can be."""
        sizes = replace(self.timing.sizes, recompute=recompute)
        layout, pack, timing = sizes.layout, self.packs[0], replace(self.timing, sizes=sizes)
        count, layers = layout.pp * (layout.vpp or 1), sizes.config.language.num_hidden_layers
        if count == 1 or layers < count:
            return layout
        loads = [0.0] * count
        loads[-1] += _both(timing.head(pack))
        if layout.encoder == "tensor":
            loads[0] += _both(timing.tiles(pack.tiles))
        given, each = [1] * count, _both(timing.layer(pack))
        for _ in range(layers - count):
            lightest = min(range(count), key=lambda number: loads[number] + given[number] * each)
            given[lightest] += 1
        return replace(layout, layers_per_stage=None if len(set(given)) == 1 else tuple(given))

    def seconds(self, layout: Layout, recompute: Any, layers: int | None = None) -> float:
        """Of a step at the least. layout: as ``balanced`` returned it; layers: computed again."""
        sizes = replace(self.timing.sizes, layout=layout, recompute=recompute, recompute_layers=layers)
        timing, total = replace(self.timing, sizes=sizes), sum(pack.tiles for pack in self.packs)
        stages = self._stages(sizes)
        stages[-1] += _both(replace(timing, sizes=sizes.of_head()).head(self.packs[0]))
        tiles = _both(timing.tiles(total)) if layout.encoder == "tensor" else 0.0
        least, ahead = 0.0, 0.0
        for rank in range(layout.pp):
            busy = len(self.packs) * sum(stages[chunk] for chunk in chunks_of_stage(layout, rank))
            least = max(least, ahead + busy + tiles * (rank == 0))
            ahead += stages[rank]
        if layout.encoder == "spread":
            least += timing.spread(max(TileShards.of(total, layout.model_parallel_size).per_rank), total)
        return least

    def _stages(self, sizes: Activations) -> list[float]:
        """Seconds that each virtual stage's layers take, forward and backward, on the cheapest pack."""
        starts = 0
        stages: list[float] = []
        for count in self.layers(sizes.layout):
            kinds = sizes.by_kind(range(starts, starts + count))
            stages.append(sum(self._of(kind, self._cheapest) * some for kind, some in kinds))
            starts += count
        return stages

    def _of(self, sizes: Activations, pack: PackShape) -> float:
        key = sizes.parts.language, sizes.recompute
        if key not in self._layer:
            self._layer[key] = replace(self.timing, sizes=sizes).layer(pack)
        return _both(self._layer[key])


def _both(time: PassTime) -> float:
    return time.forward + time.backward
