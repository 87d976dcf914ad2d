"""Which frames of a video are shown, and in what words: arithmetic on what its container says, no decoding.

Eagle shows a video as images of one tile, each with a few words before it. Its three places word it differently; the
default templates are those of the released training code, and ``docs/data.md`` has the others:

    The first video of 12.00 seconds at 2.00 fps: Frame 1: <image>
    Frame 2: <image>
    ...
"""

import math
from dataclasses import dataclass, replace
from functools import partial

from megatron_eagle.config.reading import VideoSettings, fill_template
from megatron_eagle.errors import BrokenSample

Stretch = tuple[float, float | None]  # start and end of a clip in seconds of its film; None: to the end
SPARE_END = 1.0  # seconds that a clip may end after its film: annotations are rounded
ROUNDING = 1e-6  # of a frame


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


def wanted_frames(settings: VideoSettings, info: VideoInfo) -> int:
    """Frames to show if all of them fit into the pack."""
    of_time = int(settings.fps * info.seconds) if settings.sampling == "fps" else settings.max_frames
    return max(1, min(of_time, settings.max_frames, info.frames))


def frame_times(settings: VideoSettings, info: VideoInfo, count: int) -> tuple[float, ...]:
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


def frame_words(settings: VideoSettings, video: int, info: VideoInfo, times: tuple[float, ...]) -> tuple[str, ...]:
    """What stands before each frame; the first one's begin with the header, the others with a new line.

    video: number of the video in its conversation, from 0. Time counts from the beginning of the video or clip, as in
    NVlabs/Eagle's ``handle_video_data``.
    """
    fill = partial(fill_template, video=video, seconds=info.seconds, fps=len(times) / info.seconds)
    words = [f"\n{fill(settings.frame, number=k, time=t - info.start)}" for k, t in enumerate(times, 1)]
    return (fill(settings.header, number=1, time=times[0] - info.start) + words[0].removeprefix("\n"), *words[1:])


def spread_frames(frames: int, wanted: list[int], least: list[int]) -> list[int]:
    """``frames`` divided among videos that would like to show ``wanted`` each: first everyone's least, then one by one
    to the video that has the smallest part of its wish; so more frames never take one away from any video."""
    got = list(least)
    for _ in range(frames - sum(least)):
        poorest = max(range(len(wanted)), key=lambda i: (wanted[i] - got[i] > 0, wanted[i] / (got[i] + 1)))
        got[poorest] += 1
    return got
