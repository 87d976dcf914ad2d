"""What is found of a sample in its shard: sizes of its media, from their headers, and tokens of its text."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_eagle.data.media.frames import cut_clip
from megatron_eagle.data.media.images import read_size
from megatron_eagle.data.media.video import read_info
from megatron_eagle.data.order.sample_index import BROKEN_TOKENS, Names, SampleIndex
from megatron_eagle.data.sample.chatml import encode_conversation
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import Pictures
from megatron_eagle.data.storage.location import Location
from megatron_eagle.data.storage.shards import Entry, StoredSample, parse_conversation, parse_entry
from megatron_eagle.errors import BrokenSample


@dataclass(frozen=True)
class ScannedSample:
    """One sample as found in a shard; ``reason`` says why it is broken, if it is."""

    key: str
    id: str
    pictures: Pictures
    reason: str | None


def scan_entry(key: str, entry: Entry, shard: str) -> ScannedSample:
    """A sample of the shard of that name; only headers of its media are looked at.

    All sizes are let through: they are facts, and which ones are too large is for the reader to say.
    """
    sample_id = key
    try:
        stored = parse_entry(entry)
        sample_id = stored.conversation.id
        return ScannedSample(key, sample_id, read_pictures(stored, sys.maxsize), None)
    except BrokenSample as error:
        return ScannedSample(key, sample_id, Pictures(), f"{error} ({shard}: {key})")


def count_text(entry: Entry, tokenizer: Tokenizer, system: str) -> int:
    """Tokens of a sample without tiles and frames and their words; BROKEN_TOKENS if it cannot be parsed."""
    try:
        conversation = parse_conversation(entry)
        tiles = [1] * len(conversation.images)  # of no tokens each
        no_frames = [()] * len(conversation.videos)
        return len(encode_conversation(conversation, tokenizer, tiles, 0, system, no_frames).tokens)
    except BrokenSample:
        return BROKEN_TOKENS


def read_pictures(stored: StoredSample, max_pixels: int) -> Pictures:
    """Sizes of a sample's media, from their headers; raises BrokenSample."""
    conversation = stored.conversation
    films = [read_info(video, max_pixels=max_pixels) for video in stored.videos]
    clips = conversation.video_clips or (None,) * len(films)
    return Pictures(
        tuple(read_size(image, max_pixels=max_pixels) for image in stored.images),
        tuple(film if clip is None else cut_clip(film, clip) for film, clip in zip(films, clips, strict=True)),
        conversation.video_numbers,
        conversation.image_documents,
        conversation.image_numbers if conversation.image_documents else (),
    )


def assemble_index(folder: Location, identity: str, scanned: Sequence[ScannedSample]) -> SampleIndex:
    """The index of these samples."""
    sizes = [size for sample in scanned for size in sample.pictures.sizes]
    videos = [(v.width, v.height, v.seconds, v.rate) for sample in scanned for v in sample.pictures.videos]
    return SampleIndex(
        path=folder,
        identity=identity,
        keys=Names.of(sample.key for sample in scanned),
        ids=Names.of(sample.id for sample in scanned),
        image_sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        first_image=np.cumsum([0, *(len(sample.pictures.sizes) for sample in scanned)], dtype=np.int64),
        videos=np.array(videos, dtype=np.float64).reshape(-1, 4),
        first_video=np.cumsum([0, *(len(sample.pictures.videos) for sample in scanned)], dtype=np.int64),
        broken={number: sample.reason for number, sample in enumerate(scanned) if sample.reason is not None},
        video_numbers={n: s.pictures.video_numbers for n, s in enumerate(scanned) if s.pictures.video_numbers},
        video_starts={
            n: tuple(video.start for video in s.pictures.videos)
            for n, s in enumerate(scanned)
            if any(video.start for video in s.pictures.videos)
        },
        image_documents={n: s.pictures.image_documents for n, s in enumerate(scanned) if s.pictures.image_documents},
        image_numbers={n: s.pictures.image_numbers for n, s in enumerate(scanned) if s.pictures.image_numbers},
    )
