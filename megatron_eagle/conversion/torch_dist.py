"""Megatron's sharded checkpoints (torch_dist), read tensor by tensor, without model or process groups.

Global names and shapes do not depend on the layout that wrote a checkpoint: the layers of a transformer lie stacked
along a first axis, every process has written the chunks that it held, and ``.metadata`` says where each chunk is. So a
whole tensor can be put together from any layout's chunks. ``checkpoint/safe_index.py`` has seen all files before they
are used, and tensors are read with torch's weights-only loading, so a checkpoint from elsewhere cannot run code.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_eagle.checkpoint.files import require_ema
from megatron_eagle.checkpoint.safe_index import Region, verify
from megatron_eagle.checkpoint.sharded_state import EMA
from megatron_eagle.compat.checkpoint_index import StorageInfo
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.errors import UserError
from megatron_eagle.model.specs import NORMS_IN_CHECKPOINTS

_STACKED = re.compile(r"^((?:ema\.)?(?:language\.decoder|vision\.[^.]+\.transformer))\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class TensorAddress:
    """Where a parameter of the undivided model lies: a key, and its layer if the layers are stacked there."""

    key: str
    layer: int | None

    @classmethod
    def of(cls, name: str) -> "TensorAddress":
        match = _STACKED.match(name)
        if match is None:
            return cls(name, None)
        rest = match[3]
        for ours, stored in NORMS_IN_CHECKPOINTS.items():
            rest = rest.replace(ours, stored)
        return cls(f"{match[1]}.layers.{rest}", int(match[2]))


class TorchDist:
    """The tensors of a torch_dist checkpoint. Raises UserError if a file is missing, damaged, or would run code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = verify(folder)
        self._stored: dict[str, Any] = metadata.state_dict_metadata
        storage: dict[MetadataIndex, StorageInfo] = metadata.storage_data
        self._chunks: dict[str, list[tuple[MetadataIndex, StorageInfo]]] = defaultdict(list)
        for index, where in storage.items():
            self._chunks[index.fqn].append((index, where))

    @property
    def names(self) -> set[str]:
        """Global names of all tensors, optimizer's included."""
        return {name for name, entry in self._stored.items() if isinstance(entry, TensorStorageMetadata)}

    def info(self, name: str) -> TensorInfo:
        """Shape and type of a parameter of the undivided model; UserError if the checkpoint does not have it."""
        address = TensorAddress.of(name)
        stored = self._tensor(address)
        shape = tuple(stored.size)
        if address.layer is not None and address.layer >= shape[0]:
            raise UserError(f"{self.folder} has {shape[0]} layers of {address.key}, layer {address.layer} is asked for")
        return TensorInfo(shape if address.layer is None else shape[1:], stored.properties.dtype)

    def read(self, name: str) -> Tensor:
        """A parameter of the undivided model, put together from its chunks."""
        address, info = TensorAddress.of(name), self.info(name)
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._tensor(address).chunks}
        whole, filled = torch.empty(0), 0
        for index, where in self._chunks[address.key]:
            offsets = tuple(index.offset or ())
            size = sizes[offsets]
            if address.layer is not None:
                if not offsets[0] <= address.layer < offsets[0] + size[0]:
                    continue
                chunk = self._read_chunk(address.key, where, size)[address.layer - offsets[0]]
                offsets = offsets[1:]
            else:
                chunk = self._read_chunk(address.key, where, size)
            if chunk.shape == info.shape:
                return chunk
            if not filled:
                whole = torch.empty(info.shape, dtype=info.dtype)
            whole[tuple(slice(a, a + n) for a, n in zip(offsets, chunk.shape, strict=True))] = chunk
            filled += chunk.numel()
        if filled != info.numbers:
            raise UserError(f"{self.folder}: the chunks of {name} hold {filled} of its {info.numbers} numbers")
        return whole

    def file_of(self, name: str) -> str:
        """The files that have chunks of a parameter."""
        return ", ".join(sorted({where.relative_path for _, where in self._chunks[TensorAddress.of(name).key]}))

    def _tensor(self, address: TensorAddress) -> TensorStorageMetadata:
        stored = self._stored.get(address.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.folder} has no tensor {address.key}")
        return stored

    def _read_chunk(self, key: str, where: StorageInfo, size: tuple[int, ...]) -> Tensor:
        file = self.folder / where.relative_path
        try:
            with file.open("rb") as handle:
                region: Any = Region(handle, where.offset, where.length)
                tensor = torch.load(region, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports damage as whatever the damaged bytes led it into
            raise UserError(f"{file} is damaged at {key}: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != size:
            raise UserError(f"{file} is damaged at {key}: a tensor of {list(size)} should be there")
        return tensor


class AveragedWeights(TorchDist):
    """The same with the running mean, which is float32, in place of the weights that trained; UserError if there is
    none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._means = {name for name in self.names if name.startswith(EMA)}
        require_ema(folder, self._means)

    def info(self, name: str) -> TensorInfo:
        return super().info(self._mean_of(name))

    def read(self, name: str) -> Tensor:
        return super().read(self._mean_of(name))

    def _mean_of(self, name: str) -> str:
        return EMA + name if TensorAddress.of(EMA + name).key in self._means else name


def stored_weights(folder: Path, *, ema: bool) -> TorchDist:
    """The tensors of a torch_dist checkpoint; ema: with the running mean in place of what trained."""
    return AveragedWeights(folder) if ema else TorchDist(folder)
