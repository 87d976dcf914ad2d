"""Weights under the names of the other side: a Megatron checkpoint under Hugging Face's, and the other way round.

``sources`` (``model/hf_names.py``) is the only thing that both directions know, so that what goes out is what comes in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.tensors import TensorInfo, TensorSource
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import parameter_shapes
from megatron_eagle.model.hf_names import HfTensors
from megatron_eagle.model.weights import EMBEDDING

_VOCABULARY_TABLES = (EMBEDDING, "language.output_layer.weight")


class AsHuggingFace:
    """A Megatron checkpoint's weights as tensors of a released one."""

    def __init__(self, checkpoint: TorchDist, config: EagleConfig, dialect: Dialect) -> None:
        self._checkpoint = checkpoint
        self._origin: dict[str, tuple[str, HfTensors, int]] = {}
        self._last: tuple[str, list[Tensor]] | None = None
        infos: dict[str, TensorInfo] = {}
        for ours, source in dialect.sources(config).items():
            info = checkpoint.info(ours)
            parts = source.split(torch.empty(info.shape, dtype=info.dtype, device="meta"))
            for number, (name, part) in enumerate(zip(source.names, parts, strict=True)):
                infos[name] = TensorInfo(tuple(part.shape), part.dtype)
                self._origin[name] = (ours, source, number)
        if dialect.stored_output:
            infos[dialect.output] = infos[dialect.embedding]
            self._origin[dialect.output] = self._origin[dialect.embedding]
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> Tensor:
        """One tensor; those made of one Megatron parameter follow one another, so it is read once for all of them."""
        ours, source, number = self._origin[name]
        if self._last is None or self._last[0] != ours:
            self._last = None  # let go of one parameter before the next is read
            self._last = (ours, list(source.split(self._checkpoint.read(ours))))
        return self._last[1][number]

    def file_of(self, name: str) -> str:
        """Where the checkpoint has the parameter that this is made of."""
        ours = self._origin[name][0]
        return f"{self._checkpoint.folder} ({ours}, in {self._checkpoint.file_of(ours)})"


class AsMegatron:
    """A released checkpoint's tensors as parameters of the undivided model."""

    def __init__(self, released: TensorSource, config: EagleConfig, dialect: Dialect) -> None:
        self._released, self._sources = released, dialect.sources(config)
        self.used = {name for source in self._sources.values() for name in source.names}
        missing = sorted(self.used - set(released.infos))
        if missing:
            raise UserError(f"{len(missing)} tensors are missing, among them {', '.join(missing[:3])}")
        if dialect.stored_output:
            self.used.add(dialect.output)
        self.infos: Mapping[str, TensorInfo] = {ours: self._info(source) for ours, source in self._sources.items()}
        for ours, shape in parameter_shapes(config).items():
            if ours not in self.infos or self.infos[ours].shape != shape:
                names = ", ".join(self._sources[ours].names) if ours in self._sources else "nothing"
                raise UserError(f"{ours} needs shape {list(shape)}, {names} make {self.infos.get(ours, 'it not')}")

    def read(self, ours: str) -> Tensor:
        source = self._sources[ours]
        return source.join([self._released.read(name) for name in source.names])

    def _info(self, source: HfTensors) -> TensorInfo:
        given = [self._released.infos[name] for name in source.names]
        if len({info.dtype for info in given}) > 1:
            raise UserError(f"{', '.join(source.names)} become one matrix and are of different types")
        try:
            whole = source.join([torch.empty(info.shape, dtype=info.dtype, device="meta") for info in given])
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{', '.join(source.names)} do not fit together: {error}") from None
        return TensorInfo(tuple(whole.shape), whole.dtype)


class Only:
    """Those tensors of a source that went into a conversion."""

    def __init__(self, source: TensorSource, names: set[str]) -> None:
        self.infos: Mapping[str, TensorInfo] = {name: info for name, info in source.infos.items() if name in names}
        self.read = source.read


class Weights:
    """Parameters by their Megatron names, without the vocabulary's padding, whose rows mean nothing."""

    def __init__(self, source: Any, config: EagleConfig, names: list[str], dtype: torch.dtype | None) -> None:
        self._source, self._rows, self._dtype = source, config.language.vocab_size, dtype
        infos = {name: source.info(name) if isinstance(source, TorchDist) else source.infos[name] for name in names}
        self.infos: Mapping[str, TensorInfo] = {name: self._trimmed(name, info) for name, info in infos.items()}

    def _trimmed(self, name: str, info: TensorInfo) -> TensorInfo:
        return TensorInfo((self._rows, *info.shape[1:]), info.dtype) if name in _VOCABULARY_TABLES else info

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        tensor = tensor[: self._rows] if name in _VOCABULARY_TABLES else tensor
        return tensor.to(self._dtype) if self._dtype else tensor
