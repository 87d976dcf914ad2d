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
import random
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SavableDataset,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    stateless,
)

from megatron_eagle.compat.energon import pack_quietly
from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.order.packing import PackPlan, pack_by_settings
from megatron_eagle.data.sample.assemble import Segment, assemble_pack
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlan, VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample, parse_entry
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample

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

    stored: the files of its media; cut: the rule by which they become tiles.
    segment: tokens with an empty ``tiles`` until ``postencode_sample`` has run.
    """

    sample_id: str
    segment: Segment | None
    stored: StoredSample | None
    plan: VisualPlan | None
    reason: str | None


@edataclass
class PackSample(Sample):
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
        self._planner = VisualPlanner(settings, tokenizer)

    @stateless
    def preencode_sample(self, sample: CookedSample) -> EncodedSample:
        try:
            if sample.stored is None:
                raise BrokenSample(sample.reason)
            segment, plan = tokenise(sample.stored, self._planner)
        except BrokenSample as error:
            return _broken(sample, str(error))
        return EncodedSample.derive_from(
            sample,
            sample_id=sample.sample_id,
            segment=segment,
            stored=sample.stored,
            plan=plan,
            reason=None,
        )

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
        lengths = [len(sample.segment.tokens) for sample in samples if sample.segment is not None]
        tiles = [sample.plan.total_tiles for sample in samples if sample.plan is not None]
        return pack_by_settings(self._settings, lengths, tiles)

    @stateless
    def postencode_sample(self, sample: EncodedSample) -> EncodedSample:
        if sample.segment is None or sample.stored is None or sample.plan is None:
            return sample
        try:
            segment = add_tiles(sample.segment, sample.stored, sample.plan, self._settings)
        except BrokenSample as error:
            return _broken(sample, str(error))
        return EncodedSample.derive_from(
            sample, sample_id=sample.sample_id, segment=segment, stored=None, plan=sample.plan, reason=None
        )

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> PackSample:
        segments = [sample.segment for sample in samples if sample.segment is not None]
        batch = assemble_pack(segments, self._settings.pack_length, self._tokenizer.pad) if segments else None
        return PackSample(
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
    ) -> SavableDataset[PackSample]:
        """Energon's, without batching (a pack is the microbatch) and without its progress bar."""
        return pack_quietly(
            dataset,
            buffer_size=self._settings.reading.packing_buffer,
            pre_packer=self.select_samples_to_pack,
            sample_encoder=self.postencode_sample,
            sample_encoder_stateless=True,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )


def _broken(sample: CookedSample | EncodedSample, reason: str) -> EncodedSample:
    return EncodedSample.derive_from(
        sample, sample_id=sample.sample_id, segment=None, stored=None, plan=None, reason=reason
    )
