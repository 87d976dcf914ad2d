"""Tokens, tiles and frames of every sample of a data set, by arithmetic alone.

They must agree to the token with what is read later, or a plan would promise packs that cannot be assembled; so both
are decided in one place, ``visual_plan.py``.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.media.tiling import count_tiles
from megatron_eagle.data.order.sample_index import BROKEN_TOKENS, INDEX_FOLDER, Ints, SampleIndex, text_tokens
from megatron_eagle.data.sample.chatml import TEXT_FORMAT
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.location import read_text
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
    if not len(sample_index.videos):
        return _lengths(sample_index, tokenizer, settings)
    deciding = {**settings.flat(), **dict.fromkeys(NOT_DECIDING)}
    about = [sample_index.identity, tokenizer.fingerprint, deciding, TEXT_FORMAT]
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    file = sample_index.path / INDEX_FOLDER / f"lengths-{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(read_text(file))
        tokens, tiles, frames = (np.array(kept[key], dtype=np.int32) for key in ("tokens", "tiles", "frames"))
        rejected = {int(sample): reason for sample, reason in kept["rejected"].items()}
        return Lengths(tokens, tiles, frames, rejected, Counter(kept["outcomes"]))
    made = _lengths(sample_index, tokenizer, settings)
    if not isinstance(file, Path):  # an object store is only read
        return made
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.json")
        arrays_as_lists = {key: getattr(made, key).tolist() for key in ("tokens", "tiles", "frames")}
        partial.write_text(json.dumps({**arrays_as_lists, "rejected": made.rejected, "outcomes": made.outcomes}))
        os.replace(partial, file)
    return made


# Settings that the lengths of samples do not depend on.
NOT_DECIDING = (
    "sources", "order", "packing", "packing_delta", "plan_window", "attention_parity", "tile_cost", "reader_timeout",
    "packing_buffer", "shuffle_buffer", "max_samples_per_sequence", "max_rejected_in_a_row",
)  # fmt: skip


def _lengths(sample_index: SampleIndex, tokenizer: Tokenizer, settings: DataSettings) -> Lengths:
    text = np.asarray(text_tokens(sample_index, tokenizer, settings.reading.system))
    tiles = _tiles(sample_index, settings)
    tokens = text + tiles * settings.tokens_per_tile
    frames = np.zeros(len(sample_index), np.int64)
    without_text = np.flatnonzero(text == BROKEN_TOKENS).tolist()
    unparsed = {sample: f"cannot be parsed ({sample_index.keys[sample]})" for sample in without_text}
    rejected = {**unparsed, **sample_index.broken}
    most_tiles = settings.reading.max_tiles_per_pack
    one_by_one = (tokens > settings.pack_length) | (np.diff(np.asarray(sample_index.first_video)) > 0)
    if most_tiles is not None:
        one_by_one |= tiles > most_tiles
    planner, counts = VisualPlanner(settings, tokenizer), Counter[str]()
    for sample in np.flatnonzero(one_by_one).tolist():
        if sample in rejected:
            continue
        try:
            cut = planner.plan(sample_index.pictures_of(sample), int(text[sample]))
        except BrokenSample as error:
            rejected[sample] = str(error)
            continue
        tiles[sample], frames[sample] = cut.total_tiles, cut.total_frames
        tokens[sample] = text[sample] + cut.tokens
        counts.update(cut.outcomes)
        counts["degraded"] += bool(cut.outcomes)
    unusable = np.fromiter(rejected, dtype=np.int64, count=len(rejected))
    tokens[unusable] = tiles[unusable] = frames[unusable] = 0
    whole = len(sample_index) - len(rejected) - counts["degraded"]
    counts.update({"whole": whole, "dropped": len(rejected)})
    return Lengths(tokens.astype(np.int32), tiles.astype(np.int32), frames.astype(np.int32), rejected, +counts)


def _tiles(sample_index: SampleIndex, settings: DataSettings) -> Ints:
    """int64 [n], of images, before any degradation; each size is looked at once."""
    sizes, where = np.unique(np.asarray(sample_index.image_sizes), axis=0, return_inverse=True)
    of_size = np.array([count_tiles(width, height, settings.tiling) for width, height in sizes.tolist()], np.int64)
    images = of_size[where.reshape(-1)] if len(sizes) else np.zeros(0, np.int64)
    running = np.concatenate([[0], np.cumsum(images)])
    return running[sample_index.first_image[1:]] - running[sample_index.first_image[:-1]]
