"""Megatron's sharded checkpoints (torch_dist), read and written tensor by tensor, without model or process groups.

Global names and shapes do not depend on the layout that wrote a checkpoint: the layers of a transformer lie stacked
along a first axis, every process has written the pieces that it held, and ``.metadata`` says where each piece is. So a
whole tensor can be put together from any layout's pieces, and one written here in whole loads in any layout.

``.metadata`` is a pickle. It is read by an unpickler that knows the classes of this format and nothing else, tensors
with torch's weights-only loading, so that a checkpoint from elsewhere cannot run code.
"""

import io
import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_eagle.checkpoint.tensors import Progress, TensorInfo, check_relative
from megatron_eagle.errors import UserError
from megatron_eagle.model.specs import NORMS_IN_CHECKPOINTS

METADATA = ".metadata"
SHARD_BYTES = 4_000_000_000
# Megatron-Core 0.16 keeps a (here empty) extra state for every parallel linear layer and asks for it at load.
LINEAR = re.compile(r"\.linear_(qkv|proj|fc1|fc2)\.weight$")
_STACKED = re.compile(r"^(language\.decoder|vision\.[^.]+\.transformer)\.layers\.(\d+)\.(.+)$")
_PLAIN_CLASSES = {
    "torch": {"Size", "dtype", "device", "strided", "memory_format", "contiguous_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


@dataclass(frozen=True)
class Place:
    """Where a parameter of the undivided model lies: a key, and its layer if the layers are stacked there."""

    key: str
    layer: int | None

    @classmethod
    def of(cls, name: str) -> "Place":
        match = _STACKED.match(name)
        if match is None:
            return cls(name, None)
        rest = match[3]
        for ours, stored in NORMS_IN_CHECKPOINTS.items():
            rest = rest.replace(ours, stored)
        return cls(f"{match[1]}.layers.{rest}", int(match[2]))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN_CLASSES.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which does not belong into a checkpoint's index")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


class TorchDist:
    """The tensors of a torch_dist checkpoint. Raises UserError if a shard is missing, truncated or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / METADATA
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
            self._stored: dict[str, Any] = metadata.state_dict_metadata
            storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        except FileNotFoundError:
            raise UserError(f"{folder} is not a Megatron checkpoint: it has no {METADATA}") from None
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
            raise UserError(f"{file} is damaged: {error}") from None
        self._pieces: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = defaultdict(list)
        for index, place in storage.items():
            check_relative(place.relative_path, str(file))
            self._pieces[index.fqn].append((index, place))
        self._check_files(storage)

    @property
    def names(self) -> set[str]:
        """Global names of all tensors, optimizer's included."""
        return {name for name, entry in self._stored.items() if isinstance(entry, TensorStorageMetadata)}

    def info(self, name: str) -> TensorInfo:
        """Shape and type of a parameter of the undivided model; UserError if the checkpoint does not have it."""
        place = Place.of(name)
        stored = self._tensor(place)
        shape = tuple(stored.size)
        if place.layer is not None and place.layer >= shape[0]:
            raise UserError(f"{self.folder} has {shape[0]} layers of {place.key}, layer {place.layer} is asked for")
        return TensorInfo(shape if place.layer is None else shape[1:], stored.properties.dtype)

    def read(self, name: str) -> Tensor:
        """A parameter of the undivided model, put together from its pieces."""
        place, info = Place.of(name), self.info(name)
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._tensor(place).chunks}
        whole, filled = torch.empty(0), 0
        for index, where in self._pieces[place.key]:
            offsets = tuple(index.offset or ())
            size = sizes[offsets]
            if place.layer is not None:
                if not offsets[0] <= place.layer < offsets[0] + size[0]:
                    continue
                piece = self._read_piece(place.key, where, size)[place.layer - offsets[0]]
                offsets = offsets[1:]
            else:
                piece = self._read_piece(place.key, where, size)
            if piece.shape == info.shape:
                return piece
            if not filled:
                whole = torch.empty(info.shape, dtype=info.dtype)
            whole[tuple(slice(a, a + n) for a, n in zip(offsets, piece.shape, strict=True))] = piece
            filled += piece.numel()
        if filled != info.numbers:
            raise UserError(f"{self.folder}: the pieces of {name} hold {filled} of its {info.numbers} numbers")
        return whole

    def _tensor(self, place: Place) -> TensorStorageMetadata:
        stored = self._stored.get(place.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.folder} has no tensor {place.key}")
        return stored

    def _read_piece(self, key: str, where: _StorageInfo, size: tuple[int, ...]) -> Tensor:
        file = self.folder / where.relative_path
        try:
            with file.open("rb") as handle:
                region: Any = _Region(handle, where.offset, where.length)
                tensor = torch.load(region, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports damage as whatever the damaged bytes led it into
            raise UserError(f"{file} is damaged at {key}: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != size:
            raise UserError(f"{file} is damaged at {key}: a tensor of {list(size)} should be there")
        return tensor

    def _check_files(self, storage: Mapping[MetadataIndex, _StorageInfo]) -> None:
        ends: dict[str, int] = defaultdict(int)
        for place in storage.values():
            ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
        for name, end in sorted(ends.items()):
            try:
                size = (self.folder / name).stat().st_size
            except FileNotFoundError:
                raise UserError(f"{self.folder}: the shard {name} is missing") from None
            if size < end:
                raise UserError(f"{self.folder / name} is truncated: it has {size} bytes of {end}")


class _Region(io.RawIOBase):
    """The bytes of one tensor inside a shard, as a file of its own."""

    def __init__(self, handle: BinaryIO, start: int, length: int) -> None:
        self._handle, self._start, self._length = handle, start, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._handle.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell() if whence == os.SEEK_CUR else 0, os.SEEK_END: self._length}
        self._handle.seek(self._start + base[whence] + offset)
        return self.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self.tell())]
        return self._handle.readinto(view)  # type: ignore[attr-defined]

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._length - self.tell())
        return self._handle.read(rest if size < 0 else min(size, rest))


@dataclass(frozen=True)
class _Item:
    """One entry of a shard: a parameter, or (``info`` None) a linear layer's empty extra state."""

    key: str
    info: TensorInfo | None
    layer: int | None
    read: Callable[[], Any]


def write_torch_dist(
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    folder: Path,
    *,
    content: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write parameters of an undivided model (``infos`` by global name, all of them) as a checkpoint for any layout.

    content: Megatron's ``content_metadata``. Shards that are already there whole are kept, as in ``write_safetensors``.
    """
    layers: dict[str, int] = defaultdict(int)
    for name in infos:
        place = Place.of(name)
        layers[place.key] = max(layers[place.key], 0 if place.layer is None else place.layer + 1)
    items = list(_items(infos, read, layers))
    progress = Progress("writing", sum(info.bytes for info in infos.values()))
    stored: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for number, shard in enumerate(_shards(items, shard_bytes)):
        file = f"__0_{number}.distcp"
        for item, (start, length) in zip(shard, _write_shard(shard, folder / file, progress), strict=True):
            if item.info is None:
                stored[item.key], index = BytesStorageMetadata(), MetadataIndex(item.key)
            else:
                index = _enter(stored, item, layers[item.key])
            storage[index] = _StorageInfo(file, start, length)
    progress.close()
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(state_dict_metadata=stored, storage_data=storage)))
    torch.save({"content_metadata": dict(content)}, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps({**backend, **common}), encoding="utf-8")
    for sidecar in folder.glob("*.places.json"):
        sidecar.unlink()


def _items(
    infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], layers: Mapping[str, int]
) -> Iterator[_Item]:
    for name, info in infos.items():
        place = Place.of(name)
        yield _Item(place.key, info, place.layer, lambda name=name: read(name))  # type: ignore[misc]
        if LINEAR.search(name):
            count = layers[place.key] or 1
            key = f"{place.key.removesuffix('weight')}_extra_state/shard_{place.layer or 0}_{count}"
            yield _Item(key, None, None, lambda: [None])


def _shards(items: list[_Item], shard_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    filled = 0
    for item in items:
        size = item.info.bytes if item.info else 0
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def _write_shard(items: list[_Item], file: Path, progress: Progress) -> list[tuple[int, int]]:
    """(start, length) of every item; a shard is whole when the list of its places lies beside it."""
    sidecar = file.with_suffix(".places.json")
    size = sum(item.info.bytes for item in items if item.info)
    if sidecar.is_file() and file.is_file():
        progress.add(size)
        return [(start, length) for start, length in json.loads(sidecar.read_text(encoding="utf-8"))]
    places = []
    with file.open("wb") as handle, _without_checksums():
        for item in items:
            start = handle.tell()
            value = item.read()
            if item.info is not None:
                if TensorInfo(tuple(value.shape), value.dtype) != item.info:
                    raise ValueError(f"{item.key} was announced as {item.info}, is {value.dtype} {list(value.shape)}")
                value = value[None] if item.layer is not None else value
                # A view would take its whole storage along.
                value = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value.contiguous()
            torch.save(value, handle)
            places.append((start, handle.tell() - start))
            progress.add(item.info.bytes if item.info else 0)
        handle.flush()
        os.fsync(handle.fileno())
    part = sidecar.with_suffix(".part")
    part.write_text(json.dumps(places), encoding="utf-8")
    part.rename(sidecar)
    return places


def _enter(stored: dict[str, Any], item: _Item, layers: int) -> MetadataIndex:
    """Note an item's piece among the chunks of its tensor."""
    assert item.info is not None
    shape, offsets = item.info.shape, [0] * len(item.info.shape)
    whole = shape
    if item.layer is not None:
        shape, offsets, whole = (1, *shape), [item.layer, *offsets], (layers, *shape)
    if item.key not in stored:
        stored[item.key] = TensorStorageMetadata(TensorProperties(dtype=item.info.dtype), torch.Size(whole), [])
    if stored[item.key].size != torch.Size(whole) or stored[item.key].properties.dtype != item.info.dtype:
        raise UserError(f"layers of {item.key} differ: {item.info} in layer {item.layer}, {list(whole)} expected")
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
    stored[item.key].chunks.append(chunk)
    return MetadataIndex(item.key, chunk.offsets, len(stored[item.key].chunks) - 1)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save's checksum is slower than a disk and is not checked at load; the proof has digests of whole files."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
