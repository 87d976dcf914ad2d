"""LoRA: which linear layers get an adapter, and its numbers (Hu et al. 2021, arXiv:2106.09685).

A linear layer W becomes W + s B A with A [rank, inputs] and B [outputs, rank]; W stays what it was. A layer is called
by its part, for vision its encoder, and its place: ``language.qkv``, ``vision.siglip.fc1``, ``connector.fc2``.
"""

import re
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, BelowOne, Flag, Positive

ADAPTER = (".lora_a", ".lora_b")  # what the names of an adapter's parameters end in
BLOCK = 64  # numbers of a packed base weight that share a scale; bitsandbytes' own choice for NF4
PLACES = ("qkv", "proj", "fc1", "fc2")
LANGUAGE = tuple(f"language.{place}" for place in PLACES)
Target = Annotated[str, Field(pattern=r"^(vision|connector|language)(\.[\w*]+)*$")]


@dataclass(frozen=True, config=STRICT)
class LoraSettings:
    """Adapters of a recipe: they alone train, on a base that stays bit for bit what it was.

    rank: rows of A and columns of B.
    alpha: what B A is multiplied by, divided by the rank.
    dropout: share of an adapter's inputs that are left out while it trains.
    targets: layers that get one, e.g. language.qkv (qkv, proj, fc1, fc2), vision.siglip.fc1 or connector; a part or an
        encoder alone means all of its layers, ``*`` any characters.
    rslora: divide alpha by the root of the rank instead (Kalajdzievski 2023, arXiv:2312.03732).
    base: how layers with an adapter keep their base weight: ``nf4``, 4 bits a number, by bitsandbytes (QLoRA); null for
        what ``precision`` says.
    initial: checkpoint of adapters that the first stage starts from; without it A is drawn and B is 0.
    """

    rank: Positive = 16
    alpha: AboveZero = 32.0
    dropout: BelowOne = 0.0
    targets: tuple[Target, ...] = field(default=LANGUAGE)
    rslora: Flag = False
    base: Literal["nf4"] | None = None
    initial: str | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("lora.targets is empty: no layer would get an adapter")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a model that get adapters."""
        return tuple(dict.fromkeys(target.split(".")[0] for target in self.targets))

    def packs(self, weight: str) -> bool:
        """Whether the base weight of this global name is kept packed."""
        name = layer_name(weight.removesuffix(".weight")) if weight.endswith(".weight") else None
        return self.base is not None and name is not None and self.wants(name)

    def wants(self, layer: str) -> bool:
        """Whether ``layer``, as ``layer_name`` calls it, gets an adapter."""
        return any(fnmatchcase(layer, pattern) for target in self.targets for pattern in (target, f"{target}.*"))


def packed_bytes(elements: int) -> int:
    """Bytes of a weight in NF4: two numbers a byte, a float32 scale a block, the table of 16 values."""
    return -(-elements // 2) + 4 * -(-elements // BLOCK) + 4 * 16


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a tensor of a checkpoint, is part of an adapter."""
    return name.endswith(ADAPTER)


def layer_name(module: str) -> str | None:
    """What a linear layer is called among targets, by its global name; None of what can get no adapter.

    ``language.decoder.layers.3.self_attention.linear_qkv`` is ``language.qkv``.
    """
    place = re.search(r"\.linear_(\w+)$", module)
    if place is None or place[1] not in PLACES:
        return None
    names = module.split(".")
    return ".".join([*names[: 2 if names[0] == "vision" else 1], place[1]])
