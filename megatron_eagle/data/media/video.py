"""Frames of a video for training: the exported code's reader, whose errors are those of a sample."""

from megatron_eagle.config.reading import MAX_PIXELS
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.remote_code import video_eagle
from megatron_eagle.remote_code.frames_eagle import VideoInfo
from megatron_eagle.remote_code.video_eagle import Source


class NoVideos(UserError):
    """This machine lacks the package that videos are read with; the message names it."""


class VideoReader(video_eagle.VideoReader):
    """One open video. Raises BrokenSample if it cannot be read, NoVideos without PyAV."""

    broken = BrokenSample
    missing = NoVideos


def read_info(source: Source, *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What the container says of a video; nothing is decoded. Raises as VideoReader."""
    with VideoReader(source, max_pixels=max_pixels) as reader:
        return reader.info
