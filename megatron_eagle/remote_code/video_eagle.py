# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""Frames of a video, by PyAV: what the container says of it, and pictures at given times.

The trainer reads its videos with this very class, and a copy of this file is part of every exported folder.

Time is the container's: the frame shown at t seconds is the last one whose time stamp is not above t, whatever the
frame rate says, and a video is as long as its own packets, whatever its header or its sound says. Only frames that are
asked for are decoded, with those of the same group of pictures before them, which they are built on. Two demuxers walk
through the file: a scout looks where the key frame before a wanted time lies, and the decoder jumps there only if that
is ahead of where it is. Memory is that of one frame, however long the video. FFmpeg may raise almost anything on
damaged bytes; its errors mean a broken file.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, Protocol, Self

from PIL import Image

from .frames_eagle import MAX_PIXELS, VideoInfo

try:
    import av
except ImportError:  # 36 MB that a machine which trains on images may lack
    av = None  # type: ignore[assignment]

# Short containers' names of FFmpeg and the ending a shard's entry gets.
EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "avi": "avi", "mpegts": "ts", "flv": "flv", "mpeg": "mpg", "ogg": "ogv"}

# A video may end before its header says so: sound goes on a little, the last frame lasts. More is a cut-off file.
SPARE_SECONDS, SPARE_SHARE = 1.0, 0.1
# Containers round times to their own ticks: a frame of 1/30 s is stamped 0.033 in Matroska. Half a tick, but of coarse
# ticks (AVI counts frames) no more than Matroska's.
COARSEST_ROUNDING = 0.0005
# How far before a wanted time a key frame is looked for in a file without an index.
SECONDS_BACK = (0.0, 2.0, 8.0, 30.0, 120.0, 600.0)
LONGEST_SECONDS = 7 * 24 * 3600.0
HIGHEST_RATE = 1000.0  # frames a second; what FFmpeg guesses of uneven frames in a broadcast stream can be above it


class Openable(Protocol):
    """A part of a file, or a file elsewhere, that is read only where it is looked at."""

    def open(self) -> BinaryIO: ...


Source = bytes | Openable


@dataclass(frozen=True)
class _Frame:
    """A decoded frame; begin, end: seconds since the first frame of the video."""

    picture: Any
    begin: float
    end: float


class VideoReader:
    """One open video; ``decoded`` counts the frames that were decoded so far.

    Raises ``broken`` if it is no video, has no frames, or frames of more than ``max_pixels``; ``missing`` without PyAV.
    """

    broken: type[Exception] = ValueError
    missing: type[Exception] = ImportError

    def __init__(self, source: Source, *, max_pixels: int = MAX_PIXELS) -> None:
        if av is None:
            raise self.missing("videos are read with the package av, which is not installed here (pip install av)")
        self.decoded = 0
        self._exit = contextlib.ExitStack()
        try:
            self._container, self._stream = self._open(source)
            self._scout, self._scout_stream = self._open(source)
            self._stream.codec_context.thread_count = 1  # readers are processes already
            self._base = self._stream.time_base or Fraction(1, av.time_base)
            self._start = self._first_stamp()
            self._rounding = min(float(self._base) / 2, COARSEST_ROUNDING)
            self.info = self._read_info(max_pixels)
        except BaseException:
            self._exit.close()
            raise
        self._frames: Iterator[Any] = iter(())
        self._shown: _Frame | None = None  # the frame given last
        self._ahead: _Frame | None = None  # one decoded after it, which begins too late to have been given

    def _open(self, source: Source) -> tuple[Any, Any]:
        with self._ffmpeg("opened"):
            file = self._exit.enter_context(io.BytesIO(source) if isinstance(source, bytes) else source.open())
            container = self._exit.enter_context(av.open(file, "r", metadata_errors="replace"))
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise self.broken("no video stream in the file")
        if streams[0].codec_context is None:
            raise self.broken("video of a codec that is not known")
        return container, streams[0]

    @contextlib.contextmanager
    def _ffmpeg(self, doing: str) -> Iterator[None]:
        """Runs FFmpeg's calls only: whatever they raise is the file's fault."""
        try:
            yield
        except av.error.InvalidDataError:
            raise self.broken(f"video cannot be {doing}: not a video in a known format, or damaged") from None
        except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as error:
            raise self.broken(f"video cannot be {doing}: {error or type(error).__name__}") from error

    def __enter__(self) -> Self:
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
        with self._ffmpeg("read"):
            width, height = self._stream.codec_context.width, self._stream.codec_context.height
            rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        seconds = self._seconds(rate)
        if not 0 < rate <= HIGHEST_RATE and seconds > 0:
            rate = self._count() / seconds
        if width * height > max_pixels:
            raise self.broken(f"frames of {width}x{height} have {width * height} pixels, the limit is {max_pixels}")
        if width * height <= 0 or not 0 < seconds <= LONGEST_SECONDS or not 0 < rate <= HIGHEST_RATE:
            raise self.broken(f"video has no frames: {width}x{height}, {seconds:.2f} seconds, {rate:.2f} fps")
        return VideoInfo(width, height, seconds, rate)

    def _first_stamp(self) -> int:
        """Ticks at which the picture begins: later than the header says where sound alone comes first."""
        said = self._stream.start_time or 0
        with self._ffmpeg("read"):
            stamps = (p.pts for p in self._scout.demux(self._scout_stream) if p.pts is not None and not p.is_discard)
            return max(said, next(stamps, said))

    def _seconds(self, rate: float) -> float:
        """From the first frame to the end of the last, by the video's own packets; raises ``broken`` if they end long
        before the header says so. The header itself may count sound, or the time before the first frame."""
        with self._ffmpeg("read"):
            video_end, any_end = self._last_ends(rate)
            start = float(self._start * self._base)
            if video_end is None or any_end is None:
                return 0.0
            # Of a stream whose start it has not found, FFmpeg says the length of the whole file.
            if self._stream.duration and self._stream.start_time == self._start:
                promised, found = start + float(self._stream.duration * self._base), video_end
            else:
                promised, found = (self._container.duration or 0) / av.time_base, any_end
        if promised > found + max(SPARE_SECONDS, SPARE_SHARE * (promised - start)):
            raise self.broken(
                f"video ends after {found - start:.2f} seconds, its header promises {promised - start:.2f}"
            )
        return video_end - start

    def _last_ends(self, rate: float) -> tuple[float | None, float | None]:
        """Where the video's packets and those of all streams end, in seconds of the container, without decoding: from
        the last key frame on, or, where that cannot be found, by a walk through the file."""
        if self._container.duration:  # a stream that was recorded has none
            end = round(self._container.duration / av.time_base / self._base) + self._start
            with contextlib.suppress(av.error.FFmpegError):
                self._scout.seek(end, stream=self._scout_stream, backward=True)
                found = self._ends_from_here(rate)
                if found[0] is not None:
                    return found
        self._scout.seek(0)
        return self._ends_from_here(rate)

    def _count(self) -> int:
        """Frames of the video, by its packets."""
        with self._ffmpeg("read"):
            self._scout.seek(0)
            return sum(packet.pts is not None for packet in self._scout.demux(self._scout_stream))

    def _ends_from_here(self, rate: float) -> tuple[float | None, float | None]:
        video: float | None = None
        everything: float | None = None
        for packet in self._scout.demux():
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or packet.time_base is None:
                continue
            end = float((stamp + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index == self._scout_stream.index:
                end += 0.0 if packet.duration or not rate else 1 / rate
                video = end if video is None else max(video, end)
            everything = end if everything is None else max(everything, end)
        return video, everything

    def frames(self, seconds: Sequence[float]) -> Iterator[Image.Image]:
        """The upright RGB frame at each of ``seconds`` (ascending), one at a time; raises ``broken``."""
        for target in seconds:
            yield self._upright(self._frame_at(target).picture)

    def check(self, part: VideoInfo) -> None:
        """Decodes the first and the last frame of the video or a clip; raises ``broken`` if the file is damaged."""
        for _ in self.frames([part.start, part.start + (part.frames - 1) / part.rate]):
            pass

    def _frame_at(self, target: float) -> "_Frame":
        """The last frame that does not begin after ``target``; the first one if all do."""
        latest = target + self._rounding
        with self._ffmpeg("decoded"):
            self._jump(target)
            while not self._covers(target, latest):
                if self._ahead is not None and (self._shown is None or self._ahead.begin <= latest):
                    self._shown, self._ahead = self._ahead, None
                    continue
                frame = next(self._frames, None)
                if frame is None:
                    break
                self.decoded += 1
                self._ahead = self._timed(frame)
        if self._shown is None:
            raise self.broken("video has no frames: none can be decoded")
        spare = max(SPARE_SECONDS, SPARE_SHARE * self.info.seconds)
        if self._ahead is None and self._shown.end + spare < target:
            raise self.broken(
                f"video ends after {self._shown.begin:.2f} seconds, its header promises {self.info.seconds:.2f}"
            )
        return self._shown

    def _covers(self, target: float, latest: float) -> bool:
        """Whether the frame given last is still the one at ``target``: it begins there, or the next one is too late."""
        if self._shown is None:
            return False
        if self._ahead is not None:
            return self._ahead.begin > latest
        return abs(self._shown.begin - target) <= self._rounding

    def _jump(self, target: float) -> None:
        """Moves the decoder to the key frame before ``target``, unless it is past it already."""
        reached = self._ahead or self._shown
        if reached is not None and reached.begin >= target - self._rounding:
            return
        place, key = self._key_before(target)
        if key is not None and (reached is None or reached.begin + self._rounding < key):
            self._container.seek(place, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
            self._ahead = None
        elif reached is None:
            self._frames = self._container.decode(self._stream)

    def _key_before(self, target: float) -> tuple[int, float | None]:
        """Where to seek to, and the seconds of the key frame that is found there; None for a format that cannot seek.

        With an index the first try finds it; in a broadcast stream the place is guessed, and the next key frame may be
        too late.
        """
        latest = target + self._rounding
        for back in SECONDS_BACK:
            place = self._start + round(max(0.0, target - back) / self._base)
            with contextlib.suppress(av.error.FFmpegError):
                self._scout.seek(place, stream=self._scout_stream, backward=True)
                for packet in self._scout.demux(self._scout_stream):
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    seconds = float("inf") if stamp is None else float((stamp - self._start) * self._base)
                    if seconds > latest:
                        break
                    if packet.is_keyframe:
                        return place, seconds
            if back >= target:
                break
        return self._start, None

    def _timed(self, frame: Any) -> "_Frame":
        """Seconds since the beginning; frames without a time stamp follow one another."""
        before = self._ahead or self._shown
        follows = before.end if before else 0.0
        begin = follows if frame.pts is None else float((frame.pts - self._start) * self._base)
        lasts = max(1 / self.info.rate, float((frame.duration or 0) * self._base))
        return _Frame(frame, begin, begin + lasts)

    def _upright(self, frame: Any) -> Image.Image:
        with self._ffmpeg("converted to RGB"):
            image: Image.Image = frame.to_image()
        # FFmpeg's angle is counter-clockwise, as Pillow's.
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image
