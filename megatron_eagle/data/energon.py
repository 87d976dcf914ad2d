"""The Energon side of the stream: shards -> samples -> packs, as the hooks of one TaskEncoder.

Order of the hooks: ``cook`` parses the JSON; ``preencode_sample`` reads image sizes from headers and makes the tokens,
so lengths are known while pixels are still compressed; ``select_samples_to_pack`` chooses packs from a buffer;
``postencode_sample`` decodes and cuts tiles only for the pack that is due; ``pack_selected_samples`` assembles it.

A broken sample never raises: it travels on, marked with its reason, and leaves with a pack. So it is reported exactly
once also after a restart (Energon rebuilds its buffers by running the hooks again), and no error handler is needed
that could swallow our own bugs: every exception reaches the trainer. No hook draws random numbers; Energon's own
per-sample seeds change with the number of workers.
"""

import hashlib
import math
import random
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    PackingDataset,
    Sample,
    SavableDataset,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    stateless,
)
from torch import Tensor

from megatron_eagle.data.batch import PackedBatch
from megatron_eagle.data.broken import BrokenSample
from megatron_eagle.data.conversation import encode_conversation
from megatron_eagle.data.images import decode_image, read_size
from megatron_eagle.data.packing import PackPlan, Segment, assemble_pack, pack_balanced, pack_best_fit
from megatron_eagle.data.settings import DataSettings
from megatron_eagle.data.shards import StoredSample, parse_entry
from megatron_eagle.data.tiling import count_tiles, cut_tiles
from megatron_eagle.data.tokenizer import Tokenizer

CONVERSATION_FORMAT = {"format": "conversation"}


@edataclass
class CookedSample(Sample):
    """A parsed sample, or the reason why it is broken."""

    sample_id: str
    stored: StoredSample | None
    reason: str | None


@edataclass
class EncodedSample(Sample):
    """A tokenised sample whose images are still files, or the reason why it is broken.

    images: one file per image; tile_counts: its tiles, thumbnail included.
    segment: tokens with an empty ``tiles`` until ``postencode_sample`` has run.
    """

    sample_id: str
    segment: Segment | None
    images: tuple[bytes, ...]
    tile_counts: tuple[int, ...]
    reason: str | None


@edataclass
class Pack(Sample):
    """A finished pack, or none if every sample in it was broken; rejected: (sample id, reason) of the broken ones."""

    batch: PackedBatch | None
    rejected: list[tuple[str, str]]


@stateless
def cook(entry: dict[str, Any]) -> CookedSample:
    """A sample from its files in a shard; one that cannot be parsed goes by its key there."""
    keys = basic_sample_keys(entry)
    try:
        stored = parse_entry(entry)
    except BrokenSample as error:
        return CookedSample(**keys, sample_id=entry["__key__"], stored=None, reason=str(error))
    return CookedSample(**keys, sample_id=stored.conversation.id, stored=stored, reason=None)


class CookingTaskEncoder(DefaultTaskEncoder[CookedSample, Any, Any, Any]):
    """Parses samples and stops there; what checking a data set needs."""

    decoder = None  # raw bytes: an image is opened twice in training, and only the second time for its pixels
    cookers = [Cooker(cook, has_subflavors=CONVERSATION_FORMAT)]


class EagleTaskEncoder(CookingTaskEncoder):
    """All of Energon's hooks (see the module); holds settings and tokenizer, no state."""

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._settings = settings
        self._tokenizer = tokenizer

    @stateless
    def preencode_sample(self, sample: CookedSample) -> EncodedSample:
        try:
            if sample.stored is None:
                raise BrokenSample(sample.reason)
            segment, tile_counts = self._tokenise(sample.stored)
        except BrokenSample as error:
            return _broken(sample, str(error))
        return EncodedSample.derive_from(
            sample,
            sample_id=sample.sample_id,
            segment=segment,
            images=sample.stored.images,
            tile_counts=tile_counts,
            reason=None,
        )

    def _tokenise(self, stored: StoredSample) -> tuple[Segment, tuple[int, ...]]:
        s = self._settings
        sizes = [read_size(image, max_pixels=s.max_pixels) for image in stored.images]
        tile_counts = tuple(count_tiles(width, height, s.tiling) for width, height in sizes)
        tiles = sum(tile_counts)
        # Checked first: a text turns into millions of tokens before it could be found too long.
        if tiles * s.tokens_per_tile > s.pack_length:
            raise BrokenSample(f"sample of {tiles} tiles x {s.tokens_per_tile} tokens, a pack holds {s.pack_length}")
        if s.max_tiles_per_pack is not None and tiles > s.max_tiles_per_pack:
            raise BrokenSample(f"sample of {tiles} tiles, a pack holds {s.max_tiles_per_pack}")
        encoded = encode_conversation(stored.conversation, self._tokenizer, tile_counts, s.tokens_per_tile, s.system)
        if len(encoded.tokens) > s.pack_length:
            raise BrokenSample(f"sample of {len(encoded.tokens)} tokens ({tiles} tiles), a pack holds {s.pack_length}")
        no_tiles = torch.empty((0, 3, s.tile_size, s.tile_size), dtype=torch.uint8)
        segment = Segment(stored.conversation.id, encoded.tokens, encoded.labels, encoded.tile_slots, no_tiles)
        return segment, tile_counts

    def select_samples_to_pack(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        """Packs from a buffer, in an order that depends on its samples only; broken ones leave with the first pack."""
        good = [sample for sample in samples if sample.segment is not None]
        broken = [sample for sample in samples if sample.segment is None]
        packs = [[good[i] for i in pack] for pack in self._plan(good).packs]
        # Packs come out longest first, which training must not see.
        keys = "|".join(sample.__key__ for sample in samples)
        random.Random(hashlib.sha1(keys.encode()).digest()).shuffle(packs)
        return [broken + packs[0], *packs[1:]] if packs else [broken]

    def _plan(self, samples: list[EncodedSample]) -> PackPlan:
        s = self._settings
        lengths = [len(sample.segment.tokens) for sample in samples if sample.segment is not None]
        tiles = [sum(sample.tile_counts) for sample in samples]
        if s.packing == "best_fit":
            return pack_best_fit(lengths, s.pack_length, tiles=tiles, max_tiles=s.max_tiles_per_pack)
        delta = s.spare_packs(math.ceil(sum(lengths) / s.pack_length))
        return pack_balanced(lengths, s.pack_length, delta=delta, tiles=tiles, max_tiles=s.max_tiles_per_pack)

    @stateless
    def postencode_sample(self, sample: EncodedSample) -> EncodedSample:
        if sample.segment is None:
            return sample
        try:
            tiles = [self._cut(image, count) for image, count in zip(sample.images, sample.tile_counts, strict=True)]
        except BrokenSample as error:
            return _broken(sample, str(error))
        old = sample.segment
        segment = Segment(old.sample_id, old.tokens, old.labels, old.tile_slots, torch.cat([old.tiles, *tiles]))
        return EncodedSample.derive_from(
            sample, sample_id=sample.sample_id, segment=segment, images=(), tile_counts=sample.tile_counts, reason=None
        )

    def _cut(self, data: bytes, expected: int) -> Tensor:
        tiles = cut_tiles(decode_image(data, max_pixels=self._settings.max_pixels), self._settings.tiling)
        if len(tiles) != expected:
            raise BrokenSample(f"the image's header promises {expected} tiles, its pixels make {len(tiles)}")
        return tiles

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Pack:
        segments = [sample.segment for sample in samples if sample.segment is not None]
        batch = assemble_pack(segments, self._settings.pack_length, self._tokenizer.pad) if segments else None
        return Pack(
            __key__=",".join(sample.__key__ for sample in samples),
            __restore_key__=(),
            __subflavors__=None,
            __sources__=None,
            batch=batch,
            rejected=[(sample.sample_id, sample.reason) for sample in samples if sample.reason is not None],
        )

    def build_batch(
        self,
        dataset: SavableDataset[EncodedSample],
        *,
        batch_size: int | None,
        batch_drop_last: bool = False,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
    ) -> SavableDataset[Pack]:
        """Energon's, without batching (a pack is the microbatch) and without its progress bar."""
        return _QuietPackingDataset(
            dataset,
            buffer_size=self._settings.packing_buffer,
            pre_packer=self.select_samples_to_pack,
            sample_encoder=self.postencode_sample,
            sample_encoder_stateless=True,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )


class _QuietPackingDataset(PackingDataset[EncodedSample, EncodedSample, Pack]):
    """Energon draws a progress bar on every reader of every rank while the first buffer fills."""

    def _fill_reading_buffer(self, source_iter: Any, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter, log_progress=False)


def _broken(sample: CookedSample | EncodedSample, reason: str) -> EncodedSample:
    return EncodedSample.derive_from(
        sample, sample_id=sample.sample_id, segment=None, images=(), tile_counts=(), reason=reason
    )
