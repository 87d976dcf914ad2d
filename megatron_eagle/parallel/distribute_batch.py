"""Hands a step's packs from the one process that reads them to the others that hold the same replica of the model.

One reader per data-parallel rank, instead of one per process, because reading can go wrong: a truncated image is
skipped where it is decoded, and processes that each read for themselves would then train on different packs and hang or
be silently wrong. It also reads and decodes every image once. Tiles, by far the largest part, go only to those that
encode them: all to the pipeline stage that hosts the encoders, or, with spread encoders, each to its owner.

What the hosts must know - ids, sizes, borders - goes from host to host, over gloo also where tensors go over NCCL:
taken from a GPU's tensor it would stop every process until its GPU had caught up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eagle.data.sample.packed_batch import PackedBatch, to_device
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.parallel.shard_tiles import TileShards, send_pixels

_OF_TOKENS = ("tokens", "labels", "position_ids")
_HOST = torch.device("cpu")
_ON_HOST = ("borders", "tile_starts", "sample_ids", "useful_tokens", "rejected")


def distribute_batch(read: Callable[[], list[PackedBatch]], groups: Groups, device: torch.device) -> list[PackedBatch]:
    """Call ``read`` on the reader of this replica and return its packs on every process of the replica, on ``device``.

    With ``encoder: tensor``, processes without encoders get ``tiles`` and ``tile_slots`` of length 0. With ``encoder:
    spread``, each process gets all ``tile_slots``, and of the tiles those that it encodes (``TileShards``). A
    UserError raised by ``read`` is raised on every process of the replica, so that none is left waiting; any other
    error ends the reader with its traceback.
    """
    if groups.replica_size == 1:
        return [batch.to(device) for batch in read()]
    batches: list[PackedBatch] = []
    message: list[Any] = [None]
    if groups.is_reader:
        try:
            batches = read()
            message = [[_describe(batch) for batch in batches]]
        except UserError as error:
            message = [str(error)]
    dist.broadcast_object_list(message, src=groups.reader_rank, group=groups.replica_hosts, device=_HOST)
    if isinstance(message[0], str):
        raise UserError(message[0])
    headers: list[dict[str, Any]] = message[0]
    lengths = [header["borders"][-1] for header in headers]
    whole = _broadcast(
        [getattr(batch, name) for batch in batches for name in _OF_TOKENS],
        [length for length in lengths for _ in _OF_TOKENS],
        torch.int64,
        groups,
        device,
    )
    weights = _broadcast([batch.loss_weights for batch in batches], lengths, torch.float32, groups, device)
    distribute_tiles = _shard_tiles_by_pack if groups.spread_encoders else _distribute_tiles
    tiles = distribute_tiles(batches, headers, groups, device)
    knows_tiles = groups.is_first_stage or groups.spread_encoders
    rebuilt = []
    for number, header in enumerate(headers):
        tokens, labels, position_ids = whole[number * 3 : number * 3 + 3]
        known = {name: header[name] for name in _ON_HOST} | ({} if knows_tiles else {"tile_starts": ()})
        batch = PackedBatch(
            tokens=tokens,
            labels=labels,
            loss_weights=weights[number],
            position_ids=position_ids,
            cu_seqlens=to_device(torch.tensor(known["borders"], dtype=torch.int32), device),
            tiles=tiles[number],
            tile_slots=to_device(torch.tensor(known["tile_starts"], dtype=torch.int64), device),
            **known,
        )
        rebuilt.append(batch)
    return rebuilt


def _describe(batch: PackedBatch) -> dict[str, Any]:
    return {**{name: getattr(batch, name) for name in _ON_HOST}, "tiles": tuple(batch.tiles.shape)}


def _broadcast(
    parts: list[Tensor], sizes: list[int], dtype: torch.dtype, groups: Groups, device: torch.device
) -> list[Tensor]:
    """One broadcast over the replica for all ``parts``, which are flat and of ``sizes``."""
    if groups.is_reader:
        buffer = to_device(torch.cat([part.to(dtype) for part in parts]), device)
    else:
        buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
    dist.broadcast(buffer, src=groups.reader_rank, group=groups.replica)
    return list(buffer.split(sizes))


def _distribute_tiles(
    batches: Sequence[PackedBatch], headers: list[dict[str, Any]], groups: Groups, device: torch.device
) -> list[Tensor]:
    shapes = [header["tiles"] for header in headers]
    if not groups.is_first_stage:
        return [torch.empty((0, *shape[1:]), dtype=torch.uint8, device=device) for shape in shapes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    if groups.is_reader:
        buffer = to_device(torch.cat([batch.tiles.flatten() for batch in batches]), device)
    else:
        buffer = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    if groups.encoder_hosts_size > 1 and len(buffer):
        dist.broadcast(buffer, src=groups.reader_rank, group=groups.encoder_hosts)
    return [part.view(shape) for part, shape in zip(buffer.split(counts), shapes, strict=True)]


def _shard_tiles_by_pack(
    batches: Sequence[PackedBatch], headers: list[dict[str, Any]], groups: Groups, device: torch.device
) -> list[Tensor]:
    tiles_per_pack = [header["tiles"][0] for header in headers]
    shares = TileShards.of(sum(tiles_per_pack), groups.replica.size())
    if groups.is_reader:
        pixels = to_device(torch.cat([batch.tiles for batch in batches]), device)
    else:
        pixels = torch.empty((0, *headers[0]["tiles"][1:]), dtype=torch.uint8, device=device)
    if shares.total:
        pixels = send_pixels(pixels, shares, groups)
    return list(pixels.split(shares.block_by_pack(groups.replica.rank(), tiles_per_pack)))
