"""Tokens, tiles and frames of every sample of a data set, by arithmetic alone.

They must agree to the token with what is read later, or a plan would promise packs that cannot be assembled; so both
are decided in one place, ``cutting.py``.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_eagle.data.broken import BrokenSample
from megatron_eagle.data.catalogue import BROKEN_TOKENS, CATALOGUE_FOLDER, Catalogue, Ints, text_tokens
from megatron_eagle.data.cutting import Cutter
from megatron_eagle.data.location import read_text
from megatron_eagle.data.settings import DataSettings
from megatron_eagle.data.tiling import count_tiles
from megatron_eagle.data.tokenizer import Tokenizer


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


def dataset_lengths(catalogue: Catalogue, tokenizer: Tokenizer, settings: DataSettings) -> Lengths:
    """Lengths of every sample of a data set.

    Words before frames take a while to count, so the lengths of a data set with videos are kept beside its shards.
    """
    if not len(catalogue.videos):
        return _lengths(catalogue, tokenizer, settings)
    deciding = {**asdict(settings), **dict.fromkeys(NOT_DECIDING)}
    about = [catalogue.identity, tokenizer.fingerprint, deciding]
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    file = catalogue.path / CATALOGUE_FOLDER / f"lengths-{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(read_text(file))
        tokens, tiles, frames = (np.array(kept[key], dtype=np.int32) for key in ("tokens", "tiles", "frames"))
        rejected = {int(sample): reason for sample, reason in kept["rejected"].items()}
        return Lengths(tokens, tiles, frames, rejected, Counter(kept["outcomes"]))
    made = _lengths(catalogue, tokenizer, settings)
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


def _lengths(catalogue: Catalogue, tokenizer: Tokenizer, settings: DataSettings) -> Lengths:
    text = np.asarray(text_tokens(catalogue, tokenizer, settings.system))
    tiles = _tiles(catalogue, settings)
    tokens = text + tiles * settings.tokens_per_tile
    frames = np.zeros(len(catalogue), np.int64)
    unparsed = {sample: "cannot be parsed" for sample in np.flatnonzero(text == BROKEN_TOKENS).tolist()}
    rejected = {**unparsed, **catalogue.broken}
    most_tiles = settings.max_tiles_per_pack
    one_by_one = (tokens > settings.pack_length) | (np.diff(np.asarray(catalogue.first_video)) > 0)
    if most_tiles is not None:
        one_by_one |= tiles > most_tiles
    cutter, counts = Cutter(settings, tokenizer), Counter[str]()
    for sample in np.flatnonzero(one_by_one).tolist():
        if sample in rejected:
            continue
        try:
            cut = cutter.cut(catalogue.pictures_of(sample), int(text[sample]))
        except BrokenSample as error:
            rejected[sample] = str(error)
            continue
        tiles[sample], frames[sample] = cut.total_tiles, cut.total_frames
        tokens[sample] = text[sample] + cut.tokens
        counts.update(cut.outcomes)
        counts["degraded"] += bool(cut.outcomes)
    unusable = np.fromiter(rejected, dtype=np.int64, count=len(rejected))
    tokens[unusable] = tiles[unusable] = frames[unusable] = 0
    whole = len(catalogue) - len(rejected) - counts["degraded"]
    counts.update({"whole": whole, "dropped": len(rejected)})
    return Lengths(tokens.astype(np.int32), tiles.astype(np.int32), frames.astype(np.int32), rejected, +counts)


def _tiles(catalogue: Catalogue, settings: DataSettings) -> Ints:
    """int64 [n], of images, before any degradation; each size is looked at once."""
    sizes, where = np.unique(np.asarray(catalogue.image_sizes), axis=0, return_inverse=True)
    of_size = np.array([count_tiles(width, height, settings.tiling) for width, height in sizes.tolist()], np.int64)
    images = of_size[where.reshape(-1)] if len(sizes) else np.zeros(0, np.int64)
    running = np.concatenate([[0], np.cumsum(images)])
    return running[catalogue.first_image[1:]] - running[catalogue.first_image[:-1]]
