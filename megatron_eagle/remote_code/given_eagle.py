# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""What a caller gives the processor: options, and pictures and videos in any of the forms that transformers knows.

Part of an exported folder.
"""

import base64
import binascii
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from .frames_eagle import VideoInfo, VideoReading, frame_times, wanted_frames
from .pictures_eagle import read_picture

_NESTED = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")
# Said by transformers' callers, and true of this code whatever they say.
_WITHOUT_EFFECT = ("add_special_tokens", "sanitize_control_tokens", "return_metadata", "do_sample_frames")


class File:
    """A file that is read where it is looked at."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def open(self) -> Any:
        return self._path.open("rb")


class Options:
    """What ``__call__`` was told beside texts and media."""

    def __init__(
        self,
        *,
        return_tensors: Any = None,
        padding: Any = None,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        truncation: bool | None = None,
        max_dynamic_tiles: int | None = None,
        video_metadata: Any = None,
        fps: float | None = None,
        num_frames: int | None = None,
    ) -> None:
        if truncation:
            raise ValueError("truncation would cut through pictures; show less instead (max_dynamic_tiles, num_frames)")
        self.return_tensors, self.most_tiles, self._metadata = return_tensors, max_dynamic_tiles, video_metadata
        self._pad = padding
        self.padding = {
            "padding": True if padding is None else padding,
            "padding_side": padding_side,
            "pad_to_multiple_of": pad_to_multiple_of,
            "max_length": max_length,
        }
        self.frames: dict[str, Any] = {} if fps is None else {"sampling": "fps", "fps": float(fps)}
        if num_frames is not None:
            self.frames |= {"sampling": "uniform" if fps is None else "fps", "max_frames": num_frames}

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "Options":
        """From transformers' flat or nested arguments; TypeError names those that are not known."""
        said = {name: value for name, value in kwargs.items() if name not in _NESTED and value is not None}
        for nested in _NESTED:
            said |= kwargs.get(nested) or {}
        said = {name: value for name, value in said.items() if name not in _WITHOUT_EFFECT}
        known = cls.__init__.__kwdefaults__ or {}
        if unknown := sorted(said.keys() - known.keys()):
            raise TypeError(f"the processor does not know {', '.join(unknown)}")
        return cls(**said)

    def pads(self, texts: int) -> bool:
        return bool(self._pad) or (self._pad is None and texts > 1 and self.return_tensors is not None)

    def metadata(self, films: int) -> Iterator[Any]:
        """One entry a video; None where nothing is said."""
        found = [None] * films if self._metadata is None else list(flat(self._metadata))
        if len(found) != films:
            raise ValueError(f"video_metadata describes {len(found)} videos, {films} were given")
        return iter(found)


def dealt(media: Any, texts: Sequence[str], mark: str, flatten: Callable[[Any], Iterator[Any]]) -> list[list[Any]]:
    """The media of each text, which are given as one list a text or all in a row."""
    marks = [text.count(mark) for text in texts]
    if isinstance(media, list | tuple) and len(media) == len(texts) and all(isinstance(one, list) for one in media):
        each = [list(flatten(one)) for one in media]
    else:
        every = list(flatten(media))
        left = iter(every)
        each = [list(islice(left, count)) for count in marks] if len(every) == sum(marks) else [every]
    if [len(own) for own in each] != marks:
        raise ValueError(f"the texts have {marks} {mark} marks, given are {[len(own) for own in each]}")
    return each


def flat(media: Any) -> Iterator[Any]:
    """Media of nested lists, in order."""
    if isinstance(media, list | tuple):
        for one in media:
            yield from flat(one)
    elif media is not None:
        yield media


def flat_videos(media: Any) -> Iterator[Any]:
    """As ``flat``, of videos, each of which may be a list of pictures."""
    if isinstance(media, list | tuple) and not (media and _is_picture(media[0])):
        for one in media:
            yield from flat_videos(one)
    elif media is not None:
        yield media


def _is_picture(given: Any) -> bool:
    return isinstance(given, Image.Image) or getattr(given, "ndim", 0) == 3


def file_of(given: Any) -> Any:
    """Bytes for base64 and ``data:`` URLs; anything else as it is. ValueError for other URLs, which are not fetched."""
    if not isinstance(given, str):
        return given
    if re.match("[a-z0-9+.-]+://", given, re.IGNORECASE):
        raise ValueError(f"{given[:80]} is not fetched; pass the file")
    with contextlib.suppress(OSError):  # a long text is no name of a file
        if not given.startswith("data:") and Path(given).is_file():
            return given
    try:
        return base64.b64decode(given.split(",", 1)[-1] if given.startswith("data:") else given, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"no such file: {given[:80]}") from None


def decoded_video(
    given: Any, metadata: Any, settings: VideoReading
) -> tuple[VideoInfo, tuple[float, ...], list[Image.Image]]:
    """Length of a video of decoded frames, times and pictures of those to show."""
    said = metadata if isinstance(metadata, Mapping) else getattr(metadata, "__dict__", {})
    rate, chosen = said.get("fps"), said.get("frames_indices")
    if not rate:
        raise ValueError("decoded frames need video_metadata, such as {'fps': 2.0}: the words before them hold times")
    if not len(given):
        raise ValueError("the video has no frames")
    size = read_picture(given[0]).size
    total = int(said.get("total_num_frames") or len(given))
    if chosen is not None and len(chosen) == len(given) < total:
        info = VideoInfo(*size, total / rate, rate)
        return info, tuple(float(number) / rate for number in chosen), [read_picture(frame) for frame in given]
    info = VideoInfo(*size, len(given) / rate, rate)
    times = frame_times(settings, info, wanted_frames(settings, info))
    return info, times, [read_picture(given[min(len(given) - 1, round(time * rate))]) for time in times]
