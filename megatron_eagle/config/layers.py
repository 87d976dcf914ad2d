"""Layers of a model by name: which of them a stage freezes, and how learning rates fall from one to the next.

A tower is the language model or one of the encoders. Its weights are those in front of its layers (``embeddings``), the
layers, counted over the whole model whatever process holds them, and those behind (``output``). Freezing and decay know
a weight by its global name only, so that they are the same in every layout and in the plan.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, cast

from pydantic import Field

from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.model import EagleConfig, encoder_names

LayerNames = Annotated[
    str, Field(pattern=r"^((language|vision\.\w+)\.(embeddings|output|layers\[(-?\d+)?:(-?\d+)?\])|vision\.\w+)$")
]
_SLICE = re.compile(r"layers\[(-?\d+)?:(-?\d+)?\]")


class Layered(Protocol):
    """What a tower's numbers say of its layers."""

    @property
    def depth(self) -> int:
        """How many layers there are."""

    def layer_of(self, name: str) -> int:
        """The layer that a weight belongs to, by its global name behind the tower's: -1 in front of all, ``depth``
        behind."""


@dataclass(frozen=True)
class Tower:
    """name: ``language``, or ``vision.`` and an encoder's."""

    name: str
    numbers: Layered

    @property
    def depth(self) -> int:
        return self.numbers.depth

    def has(self, weight: str) -> bool:
        """Whether the weight of this global name is one of the tower's."""
        return weight.startswith(f"{self.name}.")

    def layer_of(self, weight: str) -> int:
        """As ``Layered.layer_of``, of a global name."""
        return self.numbers.layer_of(weight.removeprefix(f"{self.name}."))


@dataclass(frozen=True)
class Frozen:
    """Layers ``start`` to ``stop - 1`` of a tower, with -1 for its embeddings and ``depth`` for what is behind."""

    tower: Tower
    start: int
    stop: int

    def holds(self, weight: str) -> bool:
        """Whether the weight of this global name is frozen."""
        return self.tower.has(weight) and self.start <= self.tower.layer_of(weight) < self.stop


def towers(config: EagleConfig) -> list[Tower]:
    """The language model and every encoder; ValueError names an encoder that does not say what its layers are."""
    found = [Tower("language", config.language)]
    for name, settings in zip(encoder_names(config), config.encoders, strict=True):
        numbers: Any = encoder_config(settings)
        if not hasattr(numbers, "layer_of"):
            raise ValueError(f"encoder '{settings['kind']}' does not say what its layers are (depth, layer_of)")
        found.append(Tower(f"vision.{name}", cast(Layered, numbers)))
    return found


def frozen_layers(config: EagleConfig, names: Sequence[str]) -> tuple[Frozen, ...]:
    """What ``names`` (``Stage.freeze``) mean in this model; ValueError with the numbers if it has no such layers."""
    if not names:
        return ()
    found = {tower.name: tower for tower in towers(config)}
    return tuple(_frozen(name, found) for name in names)


def _frozen(name: str, found: Mapping[str, Tower]) -> Frozen:
    tower = next((tower for tower in found.values() if name == tower.name or tower.has(name)), None)
    if tower is None:
        raise ValueError(f"freeze: '{name}' is of no tower of the model; there are {', '.join(found)}")
    depth, which = tower.depth, name.removeprefix(tower.name).removeprefix(".")
    ends = {"": (-1, depth + 1), "embeddings": (-1, 0), "output": (depth, depth + 1)}
    if which in ends:
        return Frozen(tower, *ends[which])
    match = _SLICE.fullmatch(which)
    assert match, f"{name} is no name of layers"
    bounds = [int(bound) if bound else None for bound in match.groups()]
    start, stop, _ = slice(*bounds).indices(depth)
    if start >= stop or any(bound is not None and abs(bound) > depth for bound in bounds):
        raise ValueError(f"freeze: '{name}' does not fit the {depth} layers of {tower.name}, 0 to {depth - 1}")
    return Frozen(tower, start, stop)


def check_frozen(config: EagleConfig, names: Sequence[str], trainable: Sequence[str]) -> None:
    """ValueError if ``names`` are no layers of the model, of a part that does not train, or all there is of one."""
    frozen = frozen_layers(config, names)
    for name in names:
        if (part := name.partition(".")[0]) not in trainable:
            raise ValueError(f"freeze: '{name}' is of {part}, which does not train at all")
    for part in {one.tower.name.partition(".")[0] for one in frozen}:
        own = [tower for tower in towers(config) if tower.name.partition(".")[0] == part]
        if not any(learning_layers(tower, frozen) for tower in own):
            raise ValueError(f"freeze leaves nothing of {part} to train: take it out of trainable instead")


def learning_layers(tower: Tower, frozen: Sequence[Frozen]) -> list[int]:
    """Layers of ``tower`` that no part of ``frozen`` holds, with -1 for its embeddings and ``depth`` for its output."""
    own = [one for one in frozen if one.tower == tower]
    return [layer for layer in range(-1, tower.depth + 1) if not any(o.start <= layer < o.stop for o in own)]


def rate_multiple(found: Sequence[Tower], decay: Mapping[Any, float], weight: str) -> float:
    """What layer-wise decay makes of a weight's learning rate: decay^(depth - layer).

    That is 1 behind the layers, ``decay`` in the last layer, and decay^(depth + 1) in the embeddings, as BEiT's
    fine-tuning has it (microsoft/unilm, beit/optim_factory.py; the idea is ELECTRA's, Clark et al. 2020,
    arXiv:2003.10555). A tied output layer is the embedding. Each tower starts anew; the connector has no layers.
    """
    part = weight.partition(".")[0]
    tower = next((tower for tower in found if tower.has(weight)), None)
    if tower is None or part not in decay:
        return 1.0
    return float(decay[part] ** (tower.depth - tower.layer_of(weight)))
