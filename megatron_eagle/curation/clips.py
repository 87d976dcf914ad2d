"""Clips of films: where they begin and end, by length or by shots, and frames of them. All seconds are the film's."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eagle.curation.sample import Sample
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.frames import VideoInfo, cut_clip
from megatron_eagle.data.media.video import VideoReader, read_info

Clip = tuple[float, float]  # start and end
LEVELS = 4  # of each colour, in the histogram by which shots are told
SIDE = 448  # pixels of a frame's longer side that a model is shown


@dataclass(frozen=True)
class Film:
    """The part of a film that a sample shows: its file, and what the container says of the part."""

    file: FileSlice
    info: VideoInfo

    @property
    def end(self) -> float:
        """Second of the film at which the part ends."""
        return self.info.start + self.info.seconds

    def shown(self, clip: Clip) -> Clip:
        """A clip in seconds from the beginning of the part, as frames are labelled for the model that is trained."""
        return clip[0] - self.info.start, clip[1] - self.info.start


def films_of(sample: Sample) -> list[Film]:
    """What a sample shows of its films; BrokenSample if one cannot be read."""
    clips = sample.conversation.video_clips or (None,) * len(sample.videos)
    found = []
    for file, part in zip(sample.videos, clips, strict=True):
        info = read_info(file)
        found.append(Film(file, info if part is None else cut_clip(info, part)))
    return found


def clips_by_length(start: float, end: float, length: float, least: float) -> list[Clip]:
    """Clips of ``length`` seconds one behind the other; a rest shorter than ``least`` belongs to the last."""
    many = max(1, int((end - start) / length + 1e-6))
    edges = [start + number * length for number in range(many)]
    if many * length + least <= end - start + 1e-6:
        edges.append(start + many * length)
    return [(begin, stop) for begin, stop in zip(edges, [*edges[1:], end], strict=True)]


def clips_by_shots(film: Film, fps: float, cut: float, least: float, most: float) -> list[Clip]:
    """Clips that begin where the colours of two frames, 1/fps s apart, differ by more than ``cut``.

    cut: share of pixels that would have to change their colour (half the L1 distance of the histograms). A shot shorter
    than ``least`` belongs to the one before; one longer than ``most`` is divided evenly.
    """
    times = _times((film.info.start, film.end), fps)
    edges, before = [film.info.start], None
    with VideoReader(film.file) as reader:
        for time, frame in zip(times, reader.frames(times), strict=True):
            colours = _histogram(frame)
            if before is not None and abs(colours - before).sum() / 2 > cut and time - edges[-1] >= least:
                edges.append(time)
            before = colours
    if len(edges) > 1 and film.end - edges[-1] < least:
        edges.pop()
    found: list[Clip] = []
    for begin, stop in zip(edges, [*edges[1:], film.end], strict=True):
        parts = max(1, int(np.ceil((stop - begin) / most - 1e-6)))
        inner = [begin + (stop - begin) * number / parts for number in range(parts)]
        found += zip(inner, [*inner[1:], stop], strict=True)
    return found


def clip_times(clip: Clip, fps: float, most: int) -> tuple[float, ...]:
    """At which seconds a clip is looked at: at ``fps``, or ``most`` times, evenly, if that is fewer."""
    times = _times(clip, fps)
    if len(times) > most:
        times = [clip[0] + (clip[1] - clip[0]) * number / most for number in range(most)]
    return tuple(round(time, 3) for time in times)


def frames_of(file: FileSlice, times: Sequence[float]) -> list[bytes]:
    """JPEGs of the frames at these ascending seconds, no side longer than SIDE; BrokenSample."""
    found = []
    with VideoReader(file) as reader:
        for frame in reader.frames(times):
            frame.thumbnail((SIDE, SIDE))
            data = io.BytesIO()
            frame.save(data, "JPEG", quality=85)
            found.append(data.getvalue())
    return found


def _times(clip: Clip, fps: float) -> list[float]:
    return [clip[0] + number / fps for number in range(max(1, int((clip[1] - clip[0]) * fps + 1e-6)))]


def _histogram(frame: Image.Image) -> NDArray[np.float64]:
    """Shares of the pixels by colour, LEVELS ** 3 of them."""
    pixels = np.asarray(frame.convert("RGB").resize((64, 64), Image.Resampling.BOX), dtype=np.int64) * LEVELS // 256
    numbers = (pixels[..., 0] * LEVELS + pixels[..., 1]) * LEVELS + pixels[..., 2]
    counts = np.bincount(numbers.ravel(), minlength=LEVELS**3)
    return counts / counts.sum()
