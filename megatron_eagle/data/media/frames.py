"""Which frames of a video are shown, and in what words: arithmetic on what its container says, no decoding.

Eagle shows a video as images of one tile, each with a few words before it. Its three places word it differently; the
templates here are those of the released training code, and ``docs/data.md`` has the others:

    The first video of 12.00 seconds at 2.00 fps: Frame 1: <image>
    Frame 2: <image>
    ...
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt
from pydantic.dataclasses import dataclass as checked_dataclass

from megatron_eagle.config.layout import STRICT, Positive

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


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


@checked_dataclass(frozen=True, config=STRICT)
class VideoSettings:
    """How videos become frames.

    sampling: ``fps``: ``fps`` frames a second from the first on, at most ``max_frames``. ``uniform``: ``max_frames``
        frames, or all if there are fewer. Frames that must be fewer are spread evenly from the first to the last.
    fps: 2 is N_max of Automatic Degrade Sampling (Eagle 2.5, section 3.2.1); the released script trains with 4.
    least_frames: a video that cannot keep so many (or all it would like to show, if that is less) is dropped (N_min).
    frame_tiles: most tiles of a frame's grid; Eagle shows frames as one tile.
    header, frame: words before a video and before each of its frames. They may hold {ordinal}, {seconds}, {fps} of the
        video; and {number}, {time} of a frame, in seconds. Formats are Python's, such as {time:.2f}.
    """

    sampling: Literal["fps", "uniform"] = "fps"
    fps: Annotated[float, Gt(0)] = 2.0
    max_frames: Positive = 512
    least_frames: Positive = 8
    frame_tiles: Positive = 1
    header: str = "The {ordinal} video of {seconds:.2f} seconds at {fps:.2f} fps: "
    frame: str = "Frame {number}: "

    def __post_init__(self) -> None:
        for name, template in (("header", self.header), ("frame", self.frame)):
            try:
                self._fill(template, 0, 1.0, 1.0, 1, 0.0)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise ValueError(f"video.{name}={template!r} cannot be filled in: {error!r}") from None

    @staticmethod
    def _fill(template: str, video: int, seconds: float, fps: float, number: int, time: float) -> str:
        ordinal = ORDINALS[video] if video < len(ORDINALS) else f"{video + 1}th"
        return template.format(ordinal=ordinal, seconds=seconds, fps=fps, number=number, time=time)

    def wanted(self, info: VideoInfo) -> int:
        """Frames to show if there is room for all of them."""
        of_time = int(self.fps * info.seconds) if self.sampling == "fps" else self.max_frames
        return max(1, min(of_time, self.max_frames, info.frames))

    def times(self, info: VideoInfo, count: int) -> tuple[float, ...]:
        """Seconds, ascending, at which ``count`` frames are taken; each is the beginning of a frame."""
        last = info.frames - 1
        if self.sampling == "fps" and count == int(self.fps * info.seconds):
            numbers = [min(last, round(k * info.rate / self.fps)) for k in range(count)]
        else:
            numbers = [round(k * last / max(1, count - 1)) for k in range(count)]
        return tuple(number / info.rate for number in numbers)

    def words(self, video: int, info: VideoInfo, times: tuple[float, ...]) -> tuple[str, ...]:
        """What stands before each frame; the first one's begin with the header, the others with a new line.

        video: number of the video in its conversation, from 0.
        """
        fps = len(times) / info.seconds
        words = [f"\n{self._fill(self.frame, video, info.seconds, fps, k, t)}" for k, t in enumerate(times, 1)]
        header = self._fill(self.header, video, info.seconds, fps, 1, times[0])
        return (header + words[0].removeprefix("\n"), *words[1:])


def spread_frames(frames: int, wanted: list[int], least: list[int]) -> list[int]:
    """``frames`` divided among videos that would like to show ``wanted`` each: first everyone's least, then one by one
    to the video that has the smallest part of its wish; so more frames never take one away from any video."""
    got = list(least)
    for _ in range(frames - sum(least)):
        poorest = max(range(len(wanted)), key=lambda i: (wanted[i] - got[i] > 0, wanted[i] / (got[i] + 1)))
        got[poorest] += 1
    return got
