"""The endless stream of packs of one data-parallel rank, which can be saved and continued exactly.

``open_stage_stream`` opens the one that training a stage reads, for training and for all that speaks of its packs.
``open_stream`` gives one of two with the same face: ``__next__``, ``state`` and ``restore``. ``PlannedStream`` knows
all lengths beforehand and depends on the seed alone. ``PackStream``, here, is for data whose lengths are not known:
Energon reads, shuffles, blends and packs; same settings, tokenizer, seed, ranks and workers: same packs.
"""

import gc
import json
import tarfile
from collections.abc import Iterator
from typing import TypeAlias

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, reraise_exception

from megatron_eagle.compat.energon import damaged_shard, load_blend, open_loader
from megatron_eagle.compat.energon_state import decode_state, encode_state
from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer, recipe_tokenizer
from megatron_eagle.data.storage.shards import dataset_identity, shard_counts
from megatron_eagle.data.stream.energon import EagleTaskEncoder, PackSample
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.data.stream.position import deciding, read_position
from megatron_eagle.errors import UserError

# Energon prints every thread's stack when a reader is silent for a minute; filling the first buffer may take longer.
FIRST_BUFFER_SECONDS = 600.0


def open_stage_stream(recipe: Recipe, stage: Stage, rank: int = 0, world_size: int = 1) -> "Stream":
    """The packs that training ``stage`` reads, from its first one on: those of ``rank`` of ``world_size`` replicas.

    stage: of the recipe, or a variant of one by the same name. By default one reader's, so all packs of every step.
    """
    return open_stream(
        recipe.data_settings(stage),
        recipe_tokenizer(recipe),
        rank=rank,
        world_size=world_size,
        seed=recipe.data_seed(stage),
        workers=recipe.reading.workers,
        batch=stage.batch,
    )


def first_steps(recipe: Recipe, stage: Stage, steps: int, packs: int) -> list[list[PackedBatch]]:
    """The first ``steps`` times ``packs`` packs that one reader of ``stage`` gets, by steps."""
    stream = open_stage_stream(recipe, stage)
    try:
        return [[next(stream) for _ in range(packs)] for _ in range(steps)]
    finally:
        stream.close()


def open_stream(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    workers: int = 0,
    batch: int | None = None,
) -> "Stream":
    """The stream that ``reading.order`` asks for.

    batch: packs of a step over all ranks, one a rank by default; only a planned stream deals them by cost.
    """
    if settings.reading.order == "planned":
        return PlannedStream(
            settings, tokenizer, rank=rank, world_size=world_size, seed=seed, workers=workers, batch=batch
        )
    return PackStream(settings, tokenizer, rank=rank, world_size=world_size, seed=seed, workers=workers)


class PackStream(Iterator[PackedBatch]):
    """Packs for data-parallel rank ``rank`` of ``world_size``; the ranks' samples are disjoint within an epoch.

    seed: decides order and blend. workers: reader processes; 0 reads in this process.
    Raises UserError for a source that is no data set or has fewer samples than there are readers, and later if
    ``reading.max_rejected_in_a_row`` samples in a row are broken.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Tokenizer,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} data-parallel ranks")
        _check_sources(settings, world_size * max(1, workers))
        self._settings = settings
        self._tokenizer = tokenizer
        self._identity = {
            "settings": deciding(settings, "buffer"),
            "sources": [(dataset_identity(source.path), source.weight) for source in settings.sources],
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "rank": rank,
            "world_size": world_size,
            "seed": seed,
            "workers": workers,
        }
        self._workers = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            seed_offset=seed,
            global_error_handler=reraise_exception,
        )
        self._loader = self._new_loader()
        self._packs: Iterator[PackSample] | None = None

    def _new_loader(self) -> SavableDataLoader[PackSample]:
        s = self._settings
        sources = [(source.path, source.weight) for source in s.sources]
        packs = EagleTaskEncoder(s, self._tokenizer).build_train_datasets(
            **load_blend(sources, self._workers, max_samples_per_sequence=s.reading.max_samples_per_sequence),
            worker_config=self._workers,
            batch_size=None,
            shuffle_buffer_size=s.reading.shuffle_buffer,
        )
        # Without worker processes Energon would freeze and collect the garbage of the trainer itself.
        garbage = {} if self._workers.num_workers else {"gc_collect_every_n_steps": 0}
        return open_loader(
            packs,
            pin_memory=torch.cuda.is_available(),
            watchdog_initial_timeout_seconds=FIRST_BUFFER_SECONDS,
            **garbage,
        )

    def __next__(self) -> PackedBatch:
        if self._packs is None:
            self._packs = iter(self._loader)
        rejected: list[tuple[str, str]] = []
        while len(rejected) < self._settings.reading.max_rejected_in_a_row:
            pack = self._read(self._packs)
            rejected += pack.rejected
            if pack.batch is not None:
                pack.batch.rejected = rejected
                return pack.batch
        sample_id, reason = rejected[-1]
        raise UserError(
            f"{len(rejected)} samples in a row are broken, the last is {sample_id!r}: {reason} "
            f"(sources: {', '.join(source.path for source in self._settings.sources)})"
        )

    def _read(self, packs: Iterator[PackSample]) -> PackSample:
        try:
            return next(packs)
        except (ValueError, OSError, tarfile.TarError) as error:
            said = damaged_shard(error)
            if said is None:
                raise
            sources = ", ".join(source.path for source in self._settings.sources)
            raise UserError(
                f"a shard of {sources} is damaged: {said}; 'megatron-eagle data check' says more"
            ) from error

    def state(self) -> bytes:
        """The position after the pack returned last, as JSON, to be kept with the model's checkpoint."""
        loader = encode_state(self._loader.save_state_rank())
        return json.dumps({"identity": self._identity, "loader": loader}).encode()

    def restore(self, state: bytes) -> None:
        """Continues after ``state`` with exactly the packs that followed it.

        Raises UserError if the stream that was saved had other settings, ranks, workers or seed, because its
        continuation would not be the same stream, and if the state is damaged or the pickle that it once was.
        """
        saved = read_position(state, self._identity, added=("tokenizer",))
        try:
            position = decode_state(saved.get("loader"))
        except ValueError as error:
            raise UserError(f"the saved data position cannot be read: {error}") from None
        self._packs = None
        self._loader = self._new_loader()
        self._loader.restore_state_rank(position)

    def close(self) -> None:
        """Ends the reader processes, which takes Energon up to five seconds each; the stream cannot be used after."""
        self._packs = None
        del self._loader
        gc.collect()  # the loader is part of a reference cycle


Stream: TypeAlias = PlannedStream | PackStream


def _check_sources(settings: DataSettings, readers: int) -> None:
    for source in settings.sources:
        samples = sum(shard_counts(source.path).values())
        if samples < readers:
            raise UserError(f"{source.path}: {samples} samples cannot be shared out over {readers} readers")
