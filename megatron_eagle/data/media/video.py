"""Frames of a video, by PyAV: what the container says of it, and pictures at given times.

Time stamps come from the container; only frames that are asked for are decoded, with those of the same group of
pictures before them, which they are built on. Two demuxers walk through the file: a scout looks where the key frame
before a wanted time lies, and the decoder jumps there only if that is ahead of where it is. Memory is that of one
frame, however long the video. FFmpeg may raise almost anything on damaged bytes; its errors mean a broken file.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from megatron_eagle.config.reading import MAX_PIXELS
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.frames import VideoInfo
from megatron_eagle.errors import BrokenSample

# Short containers' names of FFmpeg and the ending a shard's entry gets.
EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "avi": "avi", "mpegts": "ts", "flv": "flv", "mpeg": "mpg", "ogg": "ogv"}

# A video may end before its header says so: sound goes on a little, the last frame lasts. More is a cut-off file.
SPARE_SECONDS, SPARE_SHARE = 1.0, 0.1
# How far before a wanted time a key frame is looked for in a file without an index.
SECONDS_BACK = (0.0, 2.0, 8.0, 30.0, 120.0, 600.0)
LONGEST_SECONDS = 7 * 24 * 3600.0

Source = bytes | FileSlice


@contextlib.contextmanager
def _ffmpeg(doing: str) -> Iterator[None]:
    """Runs FFmpeg's calls only: whatever they raise is the file's fault."""
    try:
        yield
    except av.error.InvalidDataError:
        raise BrokenSample(f"video cannot be {doing}: not a video in a known format, or damaged") from None
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise BrokenSample(f"video cannot be {doing}: {error or type(error).__name__}") from error


class VideoReader:
    """One open video; ``decoded`` counts the frames that were decoded so far.

    Raises BrokenSample if it is no video, has no frames, or frames of more than ``max_pixels``.
    """

    def __init__(self, source: Source, *, max_pixels: int = MAX_PIXELS) -> None:
        self.decoded = 0
        self._exit = contextlib.ExitStack()
        try:
            self._container, self._stream = self._open(source)
            self._scout, self._scout_stream = self._open(source)
            self._stream.codec_context.thread_count = 1  # readers are processes already
            self.info = self._read_info(max_pixels)
        except BaseException:
            self._exit.close()
            raise
        self._reached = float("-inf")  # seconds, of the frame decoded last
        self._base = self._stream.time_base or Fraction(1, av.time_base)
        self._start = self._stream.start_time or 0
        self._frames: Iterator[Any] = iter(())

    def _open(self, source: Source) -> tuple[InputContainer, VideoStream]:
        with _ffmpeg("opened"):
            file = self._exit.enter_context(io.BytesIO(source) if isinstance(source, bytes) else source.open())
            container = self._exit.enter_context(av.open(file, "r", metadata_errors="replace"))
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise BrokenSample("no video stream in the file")
        if streams[0].codec_context is None:
            raise BrokenSample("video of a codec that is not known")
        return container, streams[0]

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._exit.close()

    @property
    def extension(self) -> str:
        """The file name ending of the container's format, such as ``mp4``."""
        short = self._container.format.name.split(",")[0]
        return EXTENSIONS.get(short, short)

    def _read_info(self, max_pixels: int) -> VideoInfo:
        with _ffmpeg("read"):
            width, height = self._stream.codec_context.width, self._stream.codec_context.height
            rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
            seconds = self._seconds()
        if width * height > max_pixels:
            raise BrokenSample(f"frames of {width}x{height} have {width * height} pixels, the limit is {max_pixels}")
        if width * height <= 0 or not 0 < seconds <= LONGEST_SECONDS or not 0 < rate <= 1000:
            raise BrokenSample(f"video has no frames: {width}x{height}, {seconds:.2f} seconds, {rate:.2f} fps")
        return VideoInfo(width, height, seconds, rate)

    def _seconds(self) -> float:
        """From the header; a file without (a stream that was recorded) is walked through, still without decoding."""
        if self._stream.duration:
            return float(self._stream.duration * (self._stream.time_base or 0))
        if self._container.duration:
            return float(self._container.duration / av.time_base)
        times = [p.pts for p in self._scout.demux(self._scout_stream) if p.pts is not None]
        return float((max(times) - min(times)) * (self._stream.time_base or 0)) if times else 0.0

    def frames(self, seconds: Sequence[float]) -> Iterator[Image.Image]:
        """The upright RGB frame at each of ``seconds`` (ascending), one at a time; raises BrokenSample."""
        current = None
        for target in seconds:
            current = self._frame_at(target, current)
            yield self._upright(current)

    def check(self) -> None:
        """Decodes the first and the last frame; raises BrokenSample if the file is damaged or cut off."""
        for _ in self.frames([0.0, (self.info.frames - 1) / self.info.rate]):
            pass

    def _frame_at(self, target: float, current: Any) -> Any:
        """The first frame that does not begin before ``target``, give or take half a frame."""
        earliest = target - 0.5 / self.info.rate
        if current is not None and self._reached >= earliest:
            return current
        with _ffmpeg("decoded"):
            self._jump(target)
            for frame in self._frames:
                self.decoded += 1
                current = frame
                self._reached = self._time(frame)
                if self._reached >= earliest:
                    return frame
        spare = max(SPARE_SECONDS, SPARE_SHARE * self.info.seconds)
        if current is None:
            raise BrokenSample("video has no frames: none can be decoded")
        if self._reached + 1 / self.info.rate + spare < target:
            raise BrokenSample(
                f"video ends after {self._reached:.2f} seconds, its header promises {self.info.seconds:.2f}"
            )
        return current

    def _jump(self, target: float) -> None:
        """Moves the decoder to the key frame before ``target``, unless it is past it already."""
        place, key = self._key_before(target)
        fresh = self._reached == float("-inf")
        if key is not None and (fresh or self._reached + 0.5 / self.info.rate < key):
            self._container.seek(place, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
        elif fresh:
            self._frames = self._container.decode(self._stream)

    def _key_before(self, target: float) -> tuple[int, float | None]:
        """Where to seek to, and the seconds of the key frame that is found there; None for a format that cannot seek.

        With an index the first try finds it; in a broadcast stream the place is guessed, and the next key frame may be
        too late.
        """
        half = 0.5 / self.info.rate
        for back in SECONDS_BACK:
            place = self._start + round(max(0.0, target - back) / self._base)
            with contextlib.suppress(av.error.FFmpegError):
                self._scout.seek(place, stream=self._scout_stream, backward=True)
                for packet in self._scout.demux(self._scout_stream):
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    seconds = float("inf") if stamp is None else float((stamp - self._start) * self._base)
                    if seconds > target + half:
                        break
                    if packet.is_keyframe:
                        return place, seconds
            if back >= target:
                break
        return self._start, None

    def _time(self, frame: Any) -> float:
        """Seconds since the beginning; frames without a time stamp follow one another."""
        if frame.pts is None:
            return max(0.0, self._reached + 1 / self.info.rate)
        return float((frame.pts - self._start) * self._base)

    def _upright(self, frame: Any) -> Image.Image:
        with _ffmpeg("converted to RGB"):
            image: Image.Image = frame.to_image()
        # FFmpeg's angle is counter-clockwise, as Pillow's.
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def read_info(source: Source, *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What the container says of a video; nothing is decoded. Raises BrokenSample."""
    with VideoReader(source, max_pixels=max_pixels) as reader:
        return reader.info
