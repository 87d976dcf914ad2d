"""Clips: frames of [start, end) and of no other time, held against all that are decoded; time is the clip's."""

import bisect
import io
import json
import math
from fractions import Fraction

import av
import numpy as np
import pytest
from form_samples import asks, conversation, texts
from hypothesis import given
from hypothesis import settings as how_often
from hypothesis import strategies as st
from samples import BITS, frame_number, make_settings, make_tokenizer, write_video

from megatron_eagle.config.reading import Tiling, VideoSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.frames import VideoInfo, cut_clip, frame_times, frame_words, wanted_frames
from megatron_eagle.data.order.lengths import dataset_lengths
from megatron_eagle.data.order.measuring import open_sample_index
from megatron_eagle.data.order.scan import read_pictures
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample

ALL = VideoSettings(sampling="uniform", max_frames=500)


@given(st.floats(0.5, 120), st.floats(0.1, 500), st.data())
@how_often(deadline=None)
def test_a_clip_is_the_frames_that_begin_in_it(rate, seconds, data):
    film = VideoInfo(64, 64, seconds, rate)
    start = data.draw(st.floats(0, seconds, exclude_max=True))
    end = data.draw(st.floats(start, seconds, exclude_min=True)) if start < math.nextafter(seconds, 0) else seconds
    clip = cut_clip(film, (start, end))
    inside = [n for n in range(film.frames) if start - 2e-6 / rate <= n / rate < end - 0.5e-6 / rate]
    found = [round((clip.start + n / rate) * rate) for n in range(clip.frames)]
    slack = 1e-5 / rate  # a time that is a frame's to the last digits may count either way
    exact = all(
        abs(n / rate - border) > slack
        for n in (*inside, len(inside) and inside[-1] + 1, round(start * rate), round(end * rate))
        for border in (start, end)
    )
    if exact and inside:
        assert found == inside
    elif exact:
        assert found == [min(math.floor(start * rate), film.frames - 1)]
    times = frame_times(ALL, clip, wanted_frames(ALL, clip))
    assert list(times) == sorted(set(times)) and times[0] == clip.start
    if len(inside) > 1:
        assert start - slack <= times[0] and times[-1] < end + slack


def decoded(path):
    """Seconds since its first frame at which each frame begins, and the number that it shows."""
    with av.open(io.BytesIO(path.read_bytes())) as container:
        frames = [
            (float(f.pts * f.time_base), frame_number(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)
        ]
    return [(round(time - frames[0][0], 6), number) for time, number in frames]


def uneven(path):
    """A film whose frames stand longer and longer: stamps 0, 40, 120, 240, ... ms."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = BITS * 16, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1
        for number in range(30):
            pixels = np.zeros((32, BITS * 16, 3), np.uint8)
            pixels[16:] = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], 16)[None, :, None]
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = 20 * number * (number + 1), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def built(folder, *videos, films=("film.mp4",), rejected=0, frames=100):
    for name in films:
        if not (folder / name).exists():
            write_video(folder / name, frames)
    records = [asks("<video>" * (len(v) if isinstance(v, list) else 1) + "What?", video=v) for v in videos]
    lines = [json.dumps({**record, "id": f"s{n}"}) for n, record in enumerate([*records, asks("?")])]
    (folder / "x.jsonl").write_text("\n".join(lines))
    build_dataset(folder / "x.jsonl", folder / "out", max_rejected=rejected)
    return folder / "out"


def settings(path, **video):
    options = {"sampling": "uniform", "max_frames": 8, "least_frames": 1, **video}
    return make_settings(path, pack_length=8192, tile_size=48, tokens_per_tile=4, video=VideoSettings(**options))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("clips"))


def shown(sample, own, tokenizer):
    """The numbers of the frames that the model sees, and the seconds they were asked for at."""
    planner = VisualPlanner(own, tokenizer)
    segment, plan = tokenise(sample, planner)
    tiles = add_tiles(segment, sample, plan, own).tiles
    times = [time for clip in plan.clips for time in clip.times]
    return [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles], times, segment


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.ts", "film.avi", "uneven.mp4"])
@pytest.mark.parametrize(
    ("start", "end"), [(0, 3), (2, 4), (2.31, 4.87), (5.05, 5.14), (8.8, 9.9), (7, None), (4, 4.5)]
)
def test_frames_are_those_of_all_that_are_decoded(tmp_path, tokenizer, name, start, end):
    path = tmp_path / name
    every = decoded(uneven(path) if name == "uneven.mp4" else write_video(path, 100))
    clip = {"path": name, "start": start, **({} if end is None else {"end": end})}
    sample = next(iterate_samples(built(tmp_path, clip, films=(name,))))
    numbers, times, _ = shown(sample, settings(tmp_path / "out"), tokenizer)
    stamps = [time for time, _ in every]
    at = lambda time: every[bisect.bisect_right(stamps, time + 6e-4) - 1][1]  # noqa: E731 - half a container's tick
    end = stamps[-1] + 1 if end is None else end
    assert numbers == [at(time) for time in times]
    assert all(start - 1e-6 <= time < end for time in times) or len(times) == 1
    if name != "uneven.mp4":
        inside = [number for time, number in every if start - 6e-4 <= time < end - 6e-4]
        spread = [inside[round(k * (len(inside) - 1) / 7)] for k in range(8)] if len(inside) > 8 else inside
        assert numbers == (spread or [at(start)])


def test_two_frames_a_second_of_the_clip(tmp_path, tokenizer):
    sample = next(iterate_samples(built(tmp_path, {"path": "film.mp4", "start": 3, "end": 6})))
    own = settings(tmp_path / "out", sampling="fps", max_frames=100)
    assert shown(sample, own, tokenizer)[0] == [30, 35, 40, 45, 50, 55]


def test_time_is_the_clips():
    chosen = VideoSettings(frame="Frame {number} at {time:.2f} s: ")
    clip = cut_clip(VideoInfo(64, 64, 100.0, 10.0), (20.04, 22.04))
    times = frame_times(chosen, clip, wanted_frames(chosen, clip))
    assert times == (20.1, 20.6, 21.1, 21.6)
    words = frame_words(chosen, 0, clip, times)
    assert words[0] == "The first video of 2.00 seconds at 2.00 fps: Frame 1 at 0.00 s: "
    assert [word.split("at ")[-1] for word in words[1:]] == ["0.50 s: ", "1.00 s: ", "1.50 s: "]


def test_clips_of_one_film_and_whole_videos_beside_each_other(tmp_path, tokenizer):
    clips = [
        {"path": "film.mp4", "start": 1, "end": 2},
        "film.mp4",
        {"video": "film.mp4", "start_time": 8, "end_time": 9},
    ]
    out = built(tmp_path, clips)
    own = settings(out, max_frames=3, frame="Frame {number} at {time:.3f} s: ")
    sample, words = iterate_samples(out)
    assert sample.conversation.video_clips == ((1.0, 2.0), None, (8.0, 9.0))
    numbers, _, segment = shown(sample, own, tokenizer)
    assert numbers == [10, 14, 19, 0, 50, 99, 80, 84, 89]
    found = dataset_lengths(open_sample_index(out), tokenizer, own)
    assert found.tokens[0] == len(segment.tokens) and found.frames[0] == 9
    assert open_sample_index(out).pictures_of(0) == read_pictures(sample, 10**9) and not words.videos
    build_dataset(out / "shard-000000.tar", tmp_path / "again")
    assert next(iterate_samples(tmp_path / "again")).conversation.video_clips == sample.conversation.video_clips
    assert sample.conversation.before(1).video_clips == sample.conversation.video_clips


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ({"start": 10}, "clip from 10.00 to 10.00 seconds of a video of 10.00 seconds"),
        ({"start": 50, "end": 60}, "clip from 50.00 to 60.00 seconds of a video of 10.00 seconds"),
        ({"start": 5, "end": 11.5}, "clip from 5.00 to 11.50 seconds of a video of 10.00 seconds"),
        ({"end": 600000}, "clip from 0.00 to 600000.00 seconds of a video of 10.00 seconds"),
    ],
)
def test_a_clip_that_is_not_in_its_film(tmp_path, clip, reason):
    out = built(tmp_path, {"path": "film.mp4", **clip}, rejected=1)
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == f"video film.mp4: {reason}"


def test_an_end_that_was_rounded_up_is_the_films(tmp_path, tokenizer):
    sample = next(iterate_samples(built(tmp_path, {"path": "film.mp4", "start": 9, "end": 10.9})))
    assert shown(sample, settings(tmp_path / "out", max_frames=50), tokenizer)[0] == [*range(90, 100)]


@pytest.mark.parametrize(
    "clip",
    [
        {"start": -1}, {"start": "1"}, {"start": True}, {"end": 0}, {"start": 2, "end": 1}, {"start": 1, "begin": 1},
        {"start": 1, "start_time": 1}, {"start": [1]}, {"end": float("nan")}, {"end": float("inf")}, {"end": 10**400},
        {"start": 1, "fps": 2}, {"pages": "1"},
    ],
)  # fmt: skip
def test_a_clip_that_is_none(clip):
    with pytest.raises(BrokenSample, match="^'video' [^\n]*$") as caught:
        conversation(asks("?", video={"path": "a.mp4", **clip}))
    assert len(str(caught.value)) < 300


def test_clips_as_parts_of_a_message():
    part = {"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5}
    inner = {"type": "video_url", "video_url": {"url": "a.mp4", "start": 1, "end": 2.5}}
    for one in (part, inner):
        messages = [
            {"role": "user", "content": [one, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "!"},
        ]
        made = conversation({"messages": messages})
        assert made.video_clips == ((1.0, 2.5),) and texts(made)[0] == "<video>?"


def test_pictures_are_those_of_the_tiles(tmp_path, tokenizer):
    """The first frame of a clip is not the film's."""
    sample = next(iterate_samples(built(tmp_path, {"path": "film.mp4", "start": 3.2})))
    segment, plan = tokenise(sample, VisualPlanner(settings(tmp_path / "out"), tokenizer))
    tiles = add_tiles(segment, sample, plan, settings(tmp_path / "out")).tiles
    assert plan.tiling == Tiling(48) and np.isclose(plan.clips[0].times[0], 3.2)
    assert frame_number(tiles[0].permute(1, 2, 0).numpy()) == 32
