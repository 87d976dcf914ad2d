"""What a conversion reads from: names, shapes and types known at once, tensors only when they are asked for.

A folder of safetensors, a Megatron checkpoint under Hugging Face's names and a model that is being assembled from
parts are all a ``TensorSource``; conversion, comparison and proof know nothing else of them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class TensorSource(Protocol):
    """Tensors by name; ``infos`` is complete and in the order in which reading is cheapest."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor: ...


class WithDtype:
    """Another source's tensors, floating point ones rounded to ``dtype``."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, dtype if info.dtype.is_floating_point else info.dtype)
            for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(self.infos[name].dtype)


class Stored(TensorSource, Protocol):
    """A source that knows in which file a tensor is."""

    def file_of(self, name: str) -> str: ...


class Finite:
    """A source none of whose tensors, as they are read, has a NaN or an infinite number; UserError names one that has.

    Every tensor is looked at when it is read first.
    """

    def __init__(self, source: Stored) -> None:
        self._source = source
        self._seen: set[str] = set()

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._source.infos

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        if name not in self._seen and tensor.is_floating_point():
            self._check(name, tensor)
        self._seen.add(name)
        return tensor

    def _check(self, name: str, tensor: Tensor) -> None:
        nan = infinite = 0
        for block in tensor.reshape(-1).split(1 << 22):  # the mask of an embedding would take a gigabyte
            if not bool(torch.isfinite(block).all()):
                nan += int(block.isnan().sum())
                infinite += int(block.isinf().sum())
        if nan or infinite:
            found = " and ".join(
                f"{number} {what}" for number, what in ((nan, "NaN"), (infinite, "infinite")) if number
            )
            raise UserError(f"{self._source.file_of(name)}: {name} holds {found} of {tensor.numel()} numbers")


def read_all(source: TensorSource, what: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``source``, one at a time, behind a progress bar."""
    progress = Progress(what, total=sum(info.bytes for info in source.infos.values()), unit="B")
    try:
        for name, info in source.infos.items():
            yield name, source.read(name)
            progress.update(info.bytes)
    finally:
        progress.close()
