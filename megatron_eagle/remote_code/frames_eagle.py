# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""Which frames of a video are shown, and in what words: arithmetic on what its container says, no decoding.

The trainer plans its packs with these very functions, and a copy of this file is part of every exported folder. Eagle
shows a video as images of one tile, each with a few words before it. Its places word it differently; the default
templates, with nothing between two frames, are those of the released training code:

    The first video of 12.00 seconds at 2.00 fps: Frame 1: <image>Frame 2: <image>...
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

# Of a picture or a frame. Pillow's own threshold for a warning, 89 million pixels: 268 MB once decoded.
MAX_PIXELS = 89_478_485

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


class FrameSettings(Protocol):
    """sampling, fps, max_frames: which frames. header, frame, between: words before a video, a frame, between two."""

    @property
    def sampling(self) -> str: ...

    @property
    def fps(self) -> float: ...

    @property
    def max_frames(self) -> int: ...

    @property
    def header(self) -> str: ...

    @property
    def frame(self) -> str: ...

    @property
    def between(self) -> str: ...


@dataclass(frozen=True)
class VideoReading:
    """``FrameSettings`` of an exported folder, and frame_tiles, most tiles of a frame's grid; a recipe has its own."""

    sampling: str
    fps: float
    max_frames: int
    frame_tiles: int
    header: str
    frame: str
    between: str

    def __post_init__(self) -> None:
        if self.sampling not in ("fps", "uniform"):
            raise ValueError(f"sampling={self.sampling!r} is neither fps nor uniform")
        if not self.fps > 0 or self.max_frames < 1 or self.frame_tiles < 1:
            raise ValueError(
                f"fps={self.fps}, max_frames={self.max_frames} and frame_tiles={self.frame_tiles} must be above 0"
            )


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: size of an upright frame in pixels, length in seconds, frames per second.

    start: second of the film at which a clip of it begins.
    """

    width: int
    height: int
    seconds: float
    rate: float
    start: float = 0.0

    @property
    def frames(self) -> int:
        """Frames of the whole video, at least one."""
        return max(1, round(self.seconds * self.rate))


def wanted_frames(settings: FrameSettings, info: VideoInfo) -> int:
    """Frames to show if all of them fit into the pack."""
    of_time = int(settings.fps * info.seconds) if settings.sampling == "fps" else settings.max_frames
    return max(1, min(of_time, settings.max_frames, info.frames))


def frame_times(settings: FrameSettings, info: VideoInfo, count: int) -> tuple[float, ...]:
    """Seconds of the film, ascending, at which ``count`` frames are taken; each is the beginning of a frame."""
    last = info.frames - 1
    if settings.sampling == "fps" and count == int(settings.fps * info.seconds):
        numbers = [min(last, round(k * info.rate / settings.fps)) for k in range(count)]
    else:
        numbers = [spread_place(k, count, info.frames) for k in range(count)]
    return tuple(info.start + number / info.rate for number in numbers)


def spread_place(number: int, count: int, length: int) -> int:
    """Place, from 0, of the ``number``-th of ``count`` things spread from the first to the last of ``length``."""
    return round(number * (length - 1) / max(1, count - 1))


def frame_words(settings: FrameSettings, video: int, info: VideoInfo, times: tuple[float, ...]) -> tuple[str, ...]:
    """What stands before each frame; the first one's begin with the header, the others with ``between``.

    video: number of the video in its conversation, from 0. Time counts from the beginning of the video or clip, as in
    NVlabs/Eagle's ``handle_video_data``.
    """
    fill = partial(fill_template, video=video, seconds=info.seconds, fps=len(times) / info.seconds)
    words = [fill(settings.frame, number=k, time=t - info.start) for k, t in enumerate(times, 1)]
    first = fill(settings.header, number=1, time=times[0] - info.start) + words[0]
    return (first, *(settings.between + own for own in words[1:]))


def fill_template(template: str, *, video: int, seconds: float, fps: float, number: int, time: float) -> str:
    """Words before a frame or a video. video: its number in the conversation, from 0; number: the frame's, from 1."""
    ordinal = ORDINALS[video] if video < len(ORDINALS) else f"{video + 1}th"
    return template.format(ordinal=ordinal, seconds=seconds, fps=fps, number=number, time=time)
