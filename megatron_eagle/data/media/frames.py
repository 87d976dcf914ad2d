"""Which frames of a video are shown, and in what words: arithmetic on what its container says, no decoding.

Eagle shows a video as images of one tile, each with a few words before it. Its three places word it differently; the
default templates are those of the released training code, and ``docs/data.md`` has the others:

    The first video of 12.00 seconds at 2.00 fps: Frame 1: <image>
    Frame 2: <image>
    ...
"""

from dataclasses import dataclass
from functools import partial

from megatron_eagle.config.reading import VideoSettings, fill_template


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: size of an upright frame in pixels, length in seconds, frames per second."""

    width: int
    height: int
    seconds: float
    rate: float

    @property
    def frames(self) -> int:
        """Frames of the whole video, at least one."""
        return max(1, round(self.seconds * self.rate))


def wanted_frames(settings: VideoSettings, info: VideoInfo) -> int:
    """Frames to show if all of them fit into the pack."""
    of_time = int(settings.fps * info.seconds) if settings.sampling == "fps" else settings.max_frames
    return max(1, min(of_time, settings.max_frames, info.frames))


def frame_times(settings: VideoSettings, info: VideoInfo, count: int) -> tuple[float, ...]:
    """Seconds, ascending, at which ``count`` frames are taken; each is the beginning of a frame."""
    last = info.frames - 1
    if settings.sampling == "fps" and count == int(settings.fps * info.seconds):
        numbers = [min(last, round(k * info.rate / settings.fps)) for k in range(count)]
    else:
        numbers = [round(k * last / max(1, count - 1)) for k in range(count)]
    return tuple(number / info.rate for number in numbers)


def frame_words(settings: VideoSettings, video: int, info: VideoInfo, times: tuple[float, ...]) -> tuple[str, ...]:
    """What stands before each frame; the first one's begin with the header, the others with a new line.

    video: number of the video in its conversation, from 0.
    """
    fill = partial(fill_template, video=video, seconds=info.seconds, fps=len(times) / info.seconds)
    words = [f"\n{fill(settings.frame, number=k, time=t)}" for k, t in enumerate(times, 1)]
    return (fill(settings.header, number=1, time=times[0]) + words[0].removeprefix("\n"), *words[1:])


def spread_frames(frames: int, wanted: list[int], least: list[int]) -> list[int]:
    """``frames`` divided among videos that would like to show ``wanted`` each: first everyone's least, then one by one
    to the video that has the smallest part of its wish; so more frames never take one away from any video."""
    got = list(least)
    for _ in range(frames - sum(least)):
        poorest = max(range(len(wanted)), key=lambda i: (wanted[i] - got[i] > 0, wanted[i] / (got[i] + 1)))
        got[poorest] += 1
    return got
