"""PackReader: fetches the samples of a planned pack through Energon's index and makes the pack of them."""

import contextlib
import sqlite3
import tarfile
from collections.abc import Iterator

from torch.utils.data import Dataset

from megatron_eagle.compat.energon import ShardFiles
from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.media.dali import DaliDecoder
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.order.plan import PlannedPack, PlannedSample
from megatron_eagle.data.sample.assemble import Segment, assemble_pack, padding_pack
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlan, VisualPlanner
from megatron_eagle.data.storage.location import Location
from megatron_eagle.data.storage.shards import StoredSample, parse_conversation
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample


class PackReader(Dataset[PackedBatch]):
    """Reads planned packs; holds settings, tokenizer and open data sets, no position.

    gpu: number of the one that ``decoder: dali`` uses; None for DALI's CPU mode.
    """

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, gpu: int | None = None) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        self._planner = VisualPlanner(settings, tokenizer)
        self._dali = DaliDecoder(settings.tile_size, gpu) if settings.reading.decoder == "dali" else None
        self._shards: dict[Location, ShardFiles] = {}

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
        conversation = parse_conversation({"json": self._file(sample, "json")})
        images = tuple(self._file(sample, name) for name in conversation.images)
        return StoredSample(conversation, images, tuple(self._place(sample, name) for name in conversation.videos))

    def _file(self, sample: PlannedSample, ending: str) -> bytes:
        """One file of a sample."""
        with _delivered(sample, ending):
            return self._shards_of(sample).read(sample.key, ending)

    def _place(self, sample: PlannedSample, ending: str) -> FileSlice:
        """Where one file of a sample lies; a video is not read as a whole."""
        with _delivered(sample, ending):
            return FileSlice(*self._shards_of(sample).locate(sample.key, ending))

    def _where(self, sample: PlannedSample) -> str:
        """The shard of a sample and its key there, which ``data check`` speaks of."""
        try:
            shard, _, _ = self._shards_of(sample).locate(sample.key, "json")
        except (KeyError, OSError, sqlite3.Error):
            return f" ({sample.key})"
        return f" ({shard.name}: {sample.key})"

    def _shards_of(self, sample: PlannedSample) -> ShardFiles:
        if sample.path not in self._shards:
            self._shards[sample.path] = ShardFiles(sample.path)
        return self._shards[sample.path]


@contextlib.contextmanager
def _delivered(sample: PlannedSample, ending: str) -> Iterator[None]:
    """What the data's machine cannot deliver is a broken sample, not the end of the run."""
    try:
        yield
    except KeyError:
        raise BrokenSample(f"no {ending} in the shard's index for this sample") from None
    except (OSError, tarfile.TarError, sqlite3.Error) as error:
        raise BrokenSample(f"{ending} of {sample.key} cannot be read: {error}") from error
