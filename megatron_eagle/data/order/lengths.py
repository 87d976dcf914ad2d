"""Tokens, tiles and frames of every sample of a data set, by arithmetic alone.

They must agree to the token with what is read later, or a plan would promise packs that cannot be assembled; so both
are decided in one place, ``visual_plan.py``.
"""

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.media.tile_counts import count_tiles_of
from megatron_eagle.data.order.measuring import text_tokens
from megatron_eagle.data.order.sample_index import BROKEN_TOKENS, INDEX_FOLDER, Ints, SampleIndex
from megatron_eagle.data.sample.chatml import TEXT_FORMAT
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.location import Location, load_array, read_text
from megatron_eagle.data.storage.whole_file import written_whole
from megatron_eagle.errors import BrokenSample


@dataclass(frozen=True)
class Lengths:
    """tokens, tiles, frames: int32 [n] of each sample; rejected: why a sample fits into no pack (tokens 0).

    outcomes: how many samples are shown whole, how many degraded and how, how many dropped.
    """

    tokens: Ints
    tiles: Ints
    frames: Ints
    rejected: dict[int, str]
    outcomes: Counter[str] = field(default_factory=Counter)


def dataset_lengths(sample_index: SampleIndex, tokenizer: Tokenizer, settings: DataSettings) -> Lengths:
    """Lengths of every sample of a data set.

    Words before frames take a while to count, so the lengths of a data set with videos are kept beside its shards.
    """
    kept = _kept(sample_index, tokenizer, settings)
    if kept is not None:
        return kept
    text = text_tokens(sample_index, tokenizer, settings.reading.system)
    made = _lengths(sample_index, text, np.arange(len(sample_index)), VisualPlanner(settings, tokenizer))
    if len(sample_index.videos):
        _keep(made, sample_index, tokenizer, settings)
    return made


def lengths_of(sample_index: SampleIndex, text: Ints, samples: Ints, planner: VisualPlanner) -> Lengths:
    """Lengths of the samples of these numbers alone; ``rejected`` is by place among them.

    text: tokens of text of all samples (``text_tokens``), of which only those are looked at.
    """
    kept = _kept(sample_index, planner.tokenizer, planner.settings)
    if kept is None:
        return _lengths(sample_index, text, samples, planner)
    rejected = {}
    if kept.rejected:
        rejected = {n: kept.rejected[own] for n, own in enumerate(samples.tolist()) if own in kept.rejected}
    return Lengths(kept.tokens[samples], kept.tiles[samples], kept.frames[samples], rejected)


def _kept(sample_index: SampleIndex, tokenizer: Tokenizer, settings: DataSettings) -> Lengths | None:
    """The lengths that lie beside the shards of a data set with videos, mapped into memory."""
    if not len(sample_index.videos):
        return None
    file = _file(sample_index, tokenizer, settings)
    with contextlib.suppress(OSError, ValueError, KeyError):
        said = json.loads(read_text(file.with_suffix(".json")))
        numbers = load_array(file)
        if numbers.shape == (3, len(sample_index)):
            rejected = {int(sample): reason for sample, reason in said["rejected"].items()}
            return Lengths(numbers[0], numbers[1], numbers[2], rejected, Counter(said["outcomes"]))
    return None


def _keep(lengths: Lengths, sample_index: SampleIndex, tokenizer: Tokenizer, settings: DataSettings) -> None:
    file = _file(sample_index, tokenizer, settings)
    if not isinstance(file, Path):  # an object store is only read
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with written_whole(file) as partial:
            np.save(partial, np.stack([lengths.tokens, lengths.tiles, lengths.frames]))
        with written_whole(file.with_suffix(".json")) as partial:  # last: without it the numbers are not looked at
            partial.write_text(json.dumps({"rejected": lengths.rejected, "outcomes": lengths.outcomes}))


def _file(sample_index: SampleIndex, tokenizer: Tokenizer, settings: DataSettings) -> Location:
    deciding = {**settings.flat(), **dict.fromkeys(NOT_DECIDING)}
    about = [sample_index.identity, tokenizer.fingerprint, deciding, TEXT_FORMAT]
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return sample_index.path / INDEX_FOLDER / f"lengths-{name}.npy"


# Settings that the lengths of samples do not depend on.
NOT_DECIDING = (
    "sources", "order", "packing", "packing_delta", "plan_window", "attention_parity", "tile_cost", "reader_timeout",
    "packing_buffer", "shuffle_buffer", "max_samples_per_sequence", "max_rejected_in_a_row",
)  # fmt: skip


def _lengths(sample_index: SampleIndex, all_text: Ints, samples: Ints, planner: VisualPlanner) -> Lengths:
    settings = planner.settings
    text = np.asarray(all_text[samples])
    tiles = _tiles(sample_index, samples, settings)
    tokens = text + tiles * settings.tokens_per_tile
    frames = np.zeros(len(samples), np.int64)
    rejected = {
        place: f"cannot be parsed ({sample_index.keys[samples[place]]})"
        for place in np.flatnonzero(text == BROKEN_TOKENS).tolist()
    }
    if sample_index.broken:
        broken = sample_index.broken
        rejected |= {place: broken[own] for place, own in enumerate(samples.tolist()) if own in broken}
    most_tiles = settings.reading.max_tiles_per_pack
    has_videos = sample_index.first_video[samples + 1] > sample_index.first_video[samples]
    one_by_one = (tokens > settings.pack_length) | has_videos
    if most_tiles is not None:
        one_by_one |= tiles > most_tiles
    counts = Counter[str]()
    for place in np.flatnonzero(one_by_one).tolist():
        if place in rejected:
            continue
        try:
            cut = planner.plan(sample_index.pictures_of(int(samples[place])), int(text[place]))
        except BrokenSample as error:
            rejected[place] = str(error)
            continue
        tiles[place], frames[place] = cut.total_tiles, cut.total_frames
        tokens[place] = text[place] + cut.tokens
        counts.update(cut.outcomes)
        counts["degraded"] += bool(cut.outcomes)
    unusable = np.fromiter(rejected, dtype=np.int64, count=len(rejected))
    tokens[unusable] = tiles[unusable] = frames[unusable] = 0
    whole = len(samples) - len(rejected) - counts["degraded"]
    counts.update({"whole": whole, "dropped": len(rejected)})
    return Lengths(tokens.astype(np.int32), tiles.astype(np.int32), frames.astype(np.int32), rejected, +counts)


def _tiles(sample_index: SampleIndex, samples: Ints, settings: DataSettings) -> Ints:
    """int64 [samples], of images, before any degradation; each size is looked at once."""
    first = sample_index.first_image[samples]
    starts = np.concatenate([[0], np.cumsum(sample_index.first_image[samples + 1] - first)])
    which = np.arange(starts[-1]) + np.repeat(first - starts[:-1], np.diff(starts))
    # One number for both sides: finding distinct rows is ten times as slow.
    sides = sample_index.image_sizes[which].astype(np.int64)
    sizes, where = np.unique(sides[:, 0] << 32 | sides[:, 1], return_inverse=True)
    of_size = count_tiles_of(sizes >> 32, sizes & 0xFFFFFFFF, settings.tiling)
    running = np.concatenate([[0], np.cumsum(of_size[where.reshape(-1)])])
    return running[starts[1:]] - running[starts[:-1]]
