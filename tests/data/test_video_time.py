"""The frame shown at a time is FFmpeg's own: any frame rate, start, container, order of coding, and sound beside it."""

import itertools
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from samples import BITS, frame_number

from megatron_eagle.data.media.video import VideoReader, read_info
from megatron_eagle.errors import BrokenSample

TICK = Fraction(1, 1000)
CONTAINERS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "ts": "libx264", "mov": "mpeg4"}


@dataclass(frozen=True)
class Film:
    """ending: of the container. stamps: milliseconds of each frame. b_frames: frames coded in another order than shown.
    sound: seconds of sound beside the picture."""

    ending: str
    stamps: tuple[int, ...]
    b_frames: int = 0
    sound: float = 0.0


def picture(number: int) -> av.VideoFrame:
    pixels = np.zeros((32, BITS * 16, 3), np.uint8)
    pixels[16:] = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], 16)[None, :, None]
    return av.VideoFrame.from_ndarray(pixels)


def write(film: Film, path: Path) -> Path:
    codec = CONTAINERS[film.ending]
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = BITS * 16, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = TICK
        stream.codec_context.gop_size, stream.codec_context.thread_count = 7, 1
        if codec == "libx264":
            stream.codec_context.max_b_frames = film.b_frames
        sound = container.add_stream("libopus" if film.ending == "webm" else "aac", rate=48000) if film.sound else None
        for number, stamp in enumerate(film.stamps):
            frame = picture(number)
            frame.pts, frame.time_base = stamp, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for start in range(0, int(film.sound * 48000), 960):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts, silence.time_base = 48000, start, Fraction(1, 48000)
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def films() -> list[Film]:
    """Forty: constant and variable rates, late starts, B-frames and long sound through five containers."""
    rng = random.Random(20261125)
    constant = tuple(range(0, 4000, 40))
    ntsc = tuple(round(n * 1001 / 30) for n in range(60))
    slides = (0, *range(33, 1000, 33), 20_000, 40_000, 41_000)
    made = []
    for ending in CONTAINERS:
        late = rng.choice((900, 3000, 60_000))
        wild = tuple(itertools.accumulate((rng.choice((20, 33, 50, 400, 1700)) for _ in range(50)), initial=0))
        b_frames = 2 if ending in ("mp4", "mkv", "ts") else 0
        made += [
            Film(ending, constant),
            Film(ending, constant, b_frames),
            Film(ending, ntsc, b_frames),
            Film(ending, slides),
            Film(ending, wild, b_frames),
            Film(ending, wild, sound=1.0),
            Film(ending, tuple(stamp + late for stamp in constant), sound=8.0 + late / 1000),
            Film(ending, tuple(stamp + late for stamp in wild), b_frames),
        ]
    return made


def ffmpegs_answer(path: Path, fps: int) -> list[int]:
    """The number that the picture spells at 0, 1/fps, 2/fps ... seconds: FFmpeg's own fps filter, which with
    ``round=up`` shows at each time the last frame that does not begin after it."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))  # before the graph: a picture that begins late has no format until then
        graph = av.filter.Graph()
        source = graph.add_buffer(template=stream, time_base=stream.time_base)
        setpts = graph.add("setpts", "PTS-STARTPTS")
        rate = graph.add("fps", f"fps={fps}:round=up:start_time=0")
        shape = graph.add("format", "rgb24")
        sink = graph.add("buffersink")
        for one, other in itertools.pairwise((source, setpts, rate, shape, sink)):
            one.link_to(other)
        graph.configure()
        answers = []

        def drain() -> None:
            while True:
                try:
                    answers.append(frame_number(graph.vpull().to_ndarray()))
                except (av.error.BlockingIOError, av.error.EOFError):
                    return

        for frame in frames:
            graph.vpush(frame)
            drain()
        graph.vpush(None)
        drain()
    return answers


@pytest.mark.parametrize("film", films(), ids=lambda f: f"{f.ending}-{len(f.stamps)}-{f.stamps[0]}-{f.stamps[-1]}")
def test_frames_are_those_that_ffmpeg_shows(film: Film, tmp_path: Path) -> None:
    path = write(film, tmp_path / f"film.{film.ending}")
    with VideoReader(path.read_bytes()) as reader:
        last = (film.stamps[-1] - film.stamps[0]) / 1000
        assert last - 0.002 <= reader.info.seconds <= last + 2.0, "the video's own length, not that of sound or start"
        expected = ffmpegs_answer(path, fps=10)
        times = [number / 10 for number in range(int(last * 10) + 1)]
        shown = [frame_number(np.asarray(frame)) for frame in reader.frames(times)]
        assert len(expected) >= len(times) - 1  # the filter may end a frame before the last one
        assert shown[: len(expected)] == expected[: len(times)]
    with VideoReader(path.read_bytes()) as reader:  # jumping, not walking
        jumps = times[: len(expected) : max(1, len(times) // 6)]
        numbers = [frame_number(np.asarray(frame)) for frame in reader.frames(jumps)]
        assert numbers == [expected[times.index(time)] for time in jumps]


def test_every_frame_of_a_constant_rate_that_ticks_cannot_hold(tmp_path: Path) -> None:
    """1/30 s is stamped 33, 67, 100 ms in Matroska: frame k is shown at k/30 s all the same."""
    path = write(Film("mkv", tuple(round(n * 1000 / 30) for n in range(90))), tmp_path / "film.mkv")
    with VideoReader(path.read_bytes()) as reader:
        assert [frame_number(np.asarray(f)) for f in reader.frames([n / 30 for n in range(90)])] == [*range(90)]


def test_a_file_that_was_cut_off_is_still_refused(tmp_path: Path) -> None:
    data = write(Film("mkv", tuple(range(3000, 23_000, 40)), sound=23.0), tmp_path / "film.mkv").read_bytes()
    with pytest.raises(BrokenSample, match=r"ends after \d+\.\d+ seconds, its header promises 2[03]"):
        read_info(data[: len(data) // 3])
