"""PackReader: fetches the samples of a planned pack (``sample_files.py``) and makes the pack of them."""

import contextlib
import sqlite3
from collections.abc import Iterator

from torch.utils.data import Dataset

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.media.dali import DaliDecoder
from megatron_eagle.data.order.plan import PlannedPack, PlannedSample
from megatron_eagle.data.sample.assemble import Segment, assemble_pack, padding_pack
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlan, VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample, parse_entry
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.data.stream.sample_files import SampleFiles
from megatron_eagle.errors import BrokenSample


class PackReader(Dataset[PackedBatch]):
    """Reads planned packs; holds settings, tokenizer and open data sets, no position.

    gpu: number of the one that ``decoder: dali`` uses; None for DALI's CPU mode.
    """

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, gpu: int | None = None) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        self._planner = VisualPlanner(settings, tokenizer)
        self._dali = DaliDecoder(settings.tile_size, gpu) if settings.reading.decoder == "dali" else None
        self._files = SampleFiles()

    def __getitem__(self, pack: PlannedPack) -> PackedBatch:
        segments: list[Segment] = []
        rejected = list(pack.rejected)
        for sample in pack.samples:
            try:
                segments.append(self.read(sample)[0])
            except BrokenSample as error:
                rejected.append((sample.id, f"{error}{self._where(sample)}"))
        s = self._settings
        if segments:
            batch = assemble_pack(segments, s.pack_length, self._tokenizer.pad)
        else:
            batch = padding_pack(s.pack_length, self._tokenizer.pad, s.tile_size)
        batch.rejected = rejected
        return batch

    def read(self, sample: PlannedSample) -> tuple[Segment, VisualPlan, StoredSample]:
        """One sample of a pack with its tiles, how they were cut, and what lies in the shard.

        Raises BrokenSample if the shard holds something else than was planned, or what cannot be decoded.
        """
        stored = self._fetch(sample)
        if stored.conversation.id != sample.id:
            raise BrokenSample(f"sample {stored.conversation.id!r} is in its place: the shard was changed")
        segment, plan = tokenise(stored, self._planner)
        if (len(segment.tokens), plan.total_tiles) != (sample.tokens, sample.tiles):
            raise BrokenSample(
                f"has {len(segment.tokens)} tokens and {plan.total_tiles} tiles, the index says {sample.tokens} and "
                f"{sample.tiles}: the shard was changed"
            )
        return add_tiles(segment, stored, plan, self._settings, self._dali), plan, stored

    def _fetch(self, sample: PlannedSample) -> StoredSample:
        with _delivered(sample):
            entry = self._files.read(sample.path, sample.key)
        return parse_entry(entry)

    def _where(self, sample: PlannedSample) -> str:
        """The shard of a sample and its key there, which ``data check`` speaks of."""
        try:
            shard = self._files.shard_of(sample.path, sample.key)
        except (KeyError, OSError, sqlite3.Error):
            return f" ({sample.key})"
        return f" ({shard}: {sample.key})"


@contextlib.contextmanager
def _delivered(sample: PlannedSample) -> Iterator[None]:
    """What is not there, or is damaged, is a broken sample, not the end of the run. A store that does not answer is."""
    try:
        yield
    except KeyError:
        raise BrokenSample("is not in the index of the shards") from None
    except (OSError, sqlite3.Error) as error:
        raise BrokenSample(f"{sample.key} cannot be read: {error}") from error
