"""Clips of videos and frames shared out among videos; which frames are shown, in what words, is exported code."""

import math
from dataclasses import replace

from megatron_eagle.errors import BrokenSample
from megatron_eagle.remote_code.frames_eagle import (
    VideoInfo,
    frame_times,
    frame_words,
    spread_place,
    wanted_frames,
)

__all__ = [
    "Stretch",
    "VideoInfo",
    "cut_clip",
    "frame_times",
    "frame_words",
    "spread_frames",
    "spread_place",
    "wanted_frames",
]

Stretch = tuple[float, float | None]  # start and end of a clip in seconds of its film; None: to the end
SPARE_END = 1.0  # seconds that a clip may end after its film: annotations are rounded
ROUNDING = 1e-6  # of a frame


def cut_clip(film: VideoInfo, stretch: Stretch) -> VideoInfo:
    """The clip of a film that holds the frames which begin in [start, end), by its frame rate.

    A clip too short for any is the one frame that is on the screen at its start. Raises BrokenSample if the clip is not
    in the film; one that ends up to SPARE_END seconds after the film ends with it.
    """
    start, end = stretch[0], film.seconds if stretch[1] is None else stretch[1]
    first = math.ceil(start * film.rate - ROUNDING)
    after = min(math.ceil(end * film.rate - ROUNDING), film.frames)
    if start >= film.seconds or end > film.seconds + SPARE_END:
        raise BrokenSample(f"clip from {start:.2f} to {end:.2f} seconds of a video of {film.seconds:.2f} seconds")
    if after <= first:
        first = min(math.floor(start * film.rate + ROUNDING), film.frames - 1)
        after = first + 1
    return replace(film, seconds=(after - first) / film.rate, start=first / film.rate)


def spread_frames(frames: int, wanted: list[int], least: list[int]) -> list[int]:
    """``frames`` divided among videos that would like to show ``wanted`` each: first everyone's least, then one by one
    to the video that has the smallest part of its wish; so more frames never take one away from any video."""
    got = list(least)
    for _ in range(frames - sum(least)):
        poorest = max(range(len(wanted)), key=lambda i: (wanted[i] - got[i] > 0, wanted[i] / (got[i] + 1)))
        got[poorest] += 1
    return got
