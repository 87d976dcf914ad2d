"""Writing a Megatron checkpoint (torch_dist) tensor by tensor, without model or process groups.

Every parameter is written in whole, the layers of a transformer as chunks of one stacked tensor, and ``.metadata`` says
where: a checkpoint as one process would have saved it, which loads in any layout.
"""

import json
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_eagle.checkpoint.safe_index import METADATA
from megatron_eagle.compat.checkpoint_index import StorageInfo
from megatron_eagle.conversion.chunked_file import ChunkedFile
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.conversion.torch_dist import TensorAddress
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True)
class _Item:
    """One entry of a shard: a parameter."""

    key: str
    info: TensorInfo
    layer: int | None
    read: Callable[[], Tensor]


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
    places = {name: TensorAddress.of(name) for name in infos}
    layers: dict[str, int] = defaultdict(int)
    for place in places.values():
        layers[place.key] = max(layers[place.key], 0 if place.layer is None else place.layer + 1)
    items = [
        _Item(place.key, infos[name], place.layer, lambda name=name: read(name))  # type: ignore[misc]
        for name, place in places.items()
    ]
    progress = Progress("writing", total=sum(info.bytes for info in infos.values()), unit="B")
    stored: dict[str, Any] = {}
    storage: dict[MetadataIndex, StorageInfo] = {}
    for number, shard in enumerate(_shards(items, shard_bytes)):
        file = f"__0_{number}.distcp"
        for item, (start, length) in zip(shard, _write_shard(shard, folder / file, progress), strict=True):
            storage[_enter(stored, item, layers[item.key])] = StorageInfo(file, start, length)
    progress.close()
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(state_dict_metadata=stored, storage_data=storage)))
    torch.save({"content_metadata": dict(content)}, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps({**backend, **common}), encoding="utf-8")
    for sidecar in folder.glob("*.places.json"):
        sidecar.unlink()


def _shards(items: list[_Item], shard_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    filled = 0
    for item in items:
        size = item.info.bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def _write_shard(items: list[_Item], file: Path, progress: Progress) -> list[tuple[int, int]]:
    """(start, length) of every item; a shard is whole when the list of its places lies beside it."""
    sidecar = file.with_suffix(".places.json")
    size = sum(item.info.bytes for item in items)
    if sidecar.is_file() and file.is_file():
        kept = [(start, length) for start, length in json.loads(sidecar.read_text(encoding="utf-8"))]
        if len(kept) == len(items):  # before 2026-11-26 there were extra states, too
            progress.update(size)
            return kept
    places = []
    with file.open("wb") as handle, _without_checksums():
        chunked = ChunkedFile(handle)
        for item in items:
            start = handle.tell()
            value = item.read()
            if TensorInfo(tuple(value.shape), value.dtype) != item.info:
                raise ValueError(f"{item.key} was announced as {item.info}, is {value.dtype} {list(value.shape)}")
            value = value[None] if item.layer is not None else value
            # A view would take its whole storage along.
            value = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value.contiguous()
            torch.save(value, chunked)  # type: ignore[arg-type]  # it needs write and flush only
            places.append((start, handle.tell() - start))
            progress.update(item.info.bytes)
        handle.flush()
        os.fsync(handle.fileno())
    part = sidecar.with_suffix(".part")
    part.write_text(json.dumps(places), encoding="utf-8")
    part.rename(sidecar)
    return places


def _enter(stored: dict[str, Any], item: _Item, layers: int) -> MetadataIndex:
    """Note an item among the chunks of its tensor."""
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
