"""Videos: the right frames and no others decoded, whatever the container; words, budget, and what is broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import frame_number, make_settings, make_tokenizer, question, write_jsonl, write_video

from megatron_eagle.config.reading import VideoSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.frames import VideoInfo, frame_times, frame_words, spread_frames, wanted_frames
from megatron_eagle.data.media.video import VideoReader, read_info
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.data.stream.streams import PackStream
from megatron_eagle.errors import BrokenSample, UserError

KINDS = [
    ("mp4", "mpeg4"),
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("ts", "libx264"),
]
LENGTH, TOKENS_PER_TILE = 1024, 16


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return {kind: write_video(folder / f"{kind[1]}.{kind[0]}", 200, codec=kind[1]) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shown(reader, seconds):
    return [frame_number(np.asarray(frame)) for frame in reader.frames(seconds)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_asked_for(films, kind):
    with VideoReader(FileSlice.whole(films[kind])) as reader:
        assert reader.info.seconds == pytest.approx(20, abs=0.11) and reader.info.rate == 10
        assert (reader.info.width, reader.info.height) == (192, 32)
        assert reader.decoded == 0
        assert shown(reader, [0, 0.1, 3.3, 3.3, 12.0, 19.9]) == [0, 1, 33, 33, 120, 199]
        assert reader.decoded <= 1 + 1 + 3 * 13  # 33, 120 and 199 each from their own key frame
    with VideoReader(films[kind].read_bytes()) as reader:
        assert shown(reader, [n / 10 for n in range(200)]) == [*range(200)] and reader.decoded == 200


def test_a_frame_far_ahead_costs_one_group(films):
    with VideoReader(films["mp4", "libx264"].read_bytes()) as reader:
        assert shown(reader, [15.5]) == [155]
        assert reader.decoded <= 12


# Reads 512 frames of each file; prints how many were decoded, whether they were the right ones, and peak memory in MB.
PEAK = """
import json, re, sys
from pathlib import Path
import numpy as np
from samples import frame_number
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.config.reading import VideoSettings
from megatron_eagle.data.media.frames import frame_times
from megatron_eagle.data.media.video import VideoReader
for name in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    with VideoReader(FileSlice.whole(Path(name))) as reader:
        times = frame_times(VideoSettings(max_frames=512), reader.info, min(512, reader.info.frames))
        numbers = [round(t * reader.info.rate) for t in times]
        right = [frame_number(np.asarray(f)) for f in reader.frames(times)] == [n % 4096 for n in numbers]
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps([reader.decoded, right, numbers, peak]))
"""


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_a_minute(tmp_path):
    """10 800 frames, and half a gigabyte of ballast that nobody asks for; frames come from their own groups of 8."""
    short = write_video(tmp_path / "short.mp4", 60, 1, codec="libx264", group=8)
    long = write_video(tmp_path / "long.mp4", 10_800, 1, codec="libx264", group=8)
    with open(long, "ab") as file:
        file.write((500_000_000).to_bytes(4, "big") + b"free")
        file.truncate(file.tell() + 500_000_000 - 8)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PEAK, str(short), str(long)]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    (_, right, _, before), (decoded, right_too, numbers, after) = map(json.loads, lines)
    print(f"{decoded} frames decoded for {len(numbers)}, peak {before:.0f} MB -> {after:.0f} MB")
    assert right and right_too and len(numbers) == 512
    assert decoded <= sum(number % 8 + 1 for number in numbers)
    assert after - before < 30  # 2 measured; the file's index is part of it


@pytest.mark.parametrize(("turned", "corner"), [(0, (2, 2)), (90, (-3, 2)), (180, (-3, -3)), (270, (2, -3))])
def test_frames_come_out_upright(tmp_path, turned, corner):
    """A camera held sideways: the container's angle is undone; the white bar's end was top left."""
    path = write_video(tmp_path / "a.mp4", 2, turned=turned)
    with VideoReader(path.read_bytes()) as reader:
        (frame,) = reader.frames([0.0])
    picture = np.asarray(frame)
    assert picture.shape[:2] == ((192, 32) if turned in (90, 270) else (32, 192))
    assert picture[corner].mean() > 200


INFO = VideoInfo(640, 480, 20.0, 10.0)


def test_sampling():
    two = VideoSettings()
    assert wanted_frames(two, INFO) == 40 and frame_times(two, INFO, 40) == tuple(k / 2 for k in range(40))
    assert frame_times(two, INFO, 3) == (0.0, 10.0, 19.9) and frame_times(two, INFO, 1) == (0.0,)
    uniform = VideoSettings(sampling="uniform", max_frames=5)
    assert wanted_frames(uniform, INFO) == 5 and frame_times(uniform, INFO, 5) == (0.0, 5.0, 10.0, 14.9, 19.9)
    assert wanted_frames(VideoSettings(sampling="uniform"), INFO) == 200
    assert wanted_frames(VideoSettings(max_frames=7), INFO) == 7
    assert wanted_frames(VideoSettings(fps=100.0), INFO) == 200
    assert wanted_frames(VideoSettings(), VideoInfo(2, 2, 0.1, 10)) == 1


@given(st.floats(0.04, 20_000), st.floats(1, 120), st.integers(1, 600), st.sampled_from(["fps", "uniform"]))
@settings(max_examples=200, deadline=None)
def test_times_are_frames_of_the_video(seconds, rate, most, sampling):
    info, chosen = VideoInfo(64, 64, seconds, rate), VideoSettings(sampling=sampling, max_frames=most)
    for count in {1, wanted_frames(chosen, info), max(1, wanted_frames(chosen, info) // 3)}:
        times = frame_times(chosen, info, count)
        assert len(times) == count and list(times) == sorted(times)
        assert times[0] >= 0 and round(times[-1] * rate) <= info.frames - 1


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_more_frames_take_none_away(videos, data):
    wanted, least = [w for w, _ in videos], [min(pair) for pair in videos]
    few = data.draw(st.integers(sum(least), sum(wanted)))
    a, b = spread_frames(few, wanted, least), spread_frames(min(few + 1, sum(wanted)), wanted, least)
    assert sum(a) == few and all(low <= x <= y <= high for low, x, y, high in zip(least, a, b, wanted, strict=True))


def test_words():
    eagle = VideoSettings()
    assert frame_words(eagle, 0, INFO, (0.0, 10.0)) == (
        "The first video of 20.00 seconds at 0.10 fps: Frame 1: ",
        "Frame 2: ",
    )
    frame = "Frame {number} sampled at {time:.2f} seconds: "
    other = VideoSettings(header="This is a video:\n", frame=frame, between="\n")
    assert frame_words(other, 1, INFO, (0.0, 10.0)) == (
        "This is a video:\nFrame 1 sampled at 0.00 seconds: ",
        "\nFrame 2 sampled at 10.00 seconds: ",
    )
    for bad in ({"frame": "Frame {nr}: "}, {"header": "{"}, {"frame": "{}"}):
        with pytest.raises(ValueError, match=r"video\.(frame|header)=.* cannot be filled in"):
            VideoSettings(**bad)


def test_without_the_package_for_videos_images_are_built_and_videos_refused_by_name(tmp_path, films, monkeypatch):
    monkeypatch.setattr("megatron_eagle.remote_code.video_eagle.av", None)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30)).save(picture)
    (tmp_path / "film.mp4").write_bytes(films[KINDS[0]].read_bytes())
    records = [question("seen", "<image>\nWhat?", "It.", "picture.png")]
    records += [question("film", "<video>\nWhat?", "It.", video="film.mp4")]
    report = build_dataset(write_jsonl(tmp_path, records), tmp_path / "out", max_rejected=2)
    assert (report.written, report.rejected) == (1, 1)
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert "the package av, which is not installed here" in line and "film" in line
    with pytest.raises(UserError, match="the package av"):
        read_info(films[KINDS[0]].read_bytes())


def test_everything_is_imported_without_the_package_for_videos():
    code = (
        "import sys; sys.modules['av'] = None; import megatron_eagle.training.loop, megatron_eagle.data.build.dataset"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120).returncode == 0


def broken_films(folder, whole):
    import av

    data = whole.read_bytes()
    with av.open(folder / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    write_video(folder / "empty.mkv", 0)
    mkv = write_video(folder / "whole.mkv", 200).read_bytes()
    (folder / "cut.mkv").write_bytes(mkv[: len(mkv) // 3])
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video " * 100)
    rotten = bytearray(data)
    start, end = data.index(b"mdat") + 4, data.index(b"moov")
    rotten[start:end] = np.random.default_rng(0).bytes(end - start)
    (folder / "rotten.mp4").write_bytes(bytes(rotten))
    return {
        "sound.mp4": "no video stream",
        "empty.mkv": "no frames|cannot be opened",
        "cut.mkv": r"ends after [\d.]+ seconds, its header promises 20|cannot be decoded",
        "cut.mp4": "cannot be opened",
        "zero.mp4": "cannot be opened",
        "text.mp4": "cannot be opened",
        "rotten.mp4": "cannot be decoded|no frames",
        "missing.mp4": "is missing",
    }


def test_broken_videos_are_named_with_their_reason(films, tmp_path):
    reasons = broken_films(tmp_path, films["mp4", "mpeg4"])
    (tmp_path / "good.mp4").write_bytes(films["mp4", "mpeg4"].read_bytes())
    records = [question(name, "<video>\nWhat?", "It.", **{"video": name}) for name in [*reasons, "good.mp4"]]
    records += [question("markers", "<video><video>What?", "It.", video="good.mp4")]
    records += [question("none", "<video>What?", "It.")]
    report = build_dataset(write_jsonl(tmp_path, records), tmp_path / "out", max_rejected=20)
    assert (report.read, report.written, report.rejected) == (11, 1, 10)
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    listed = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    reasons |= {"markers": "more <video> markers than videos: 2", "none": "more <video> markers than videos: 1"}
    assert listed.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, listed[name]), (name, listed[name])
    with pytest.raises(BrokenSample, match="frames of 192x32 have 6144 pixels, the limit is 6000"):
        read_info(films["mp4", "mpeg4"].read_bytes(), max_pixels=6000)


def film_records(folder, films):
    """Videos, images and text in turn; LLaVA-Video's way of marking a video among them."""
    from samples import image_bytes

    (folder / "a.png").write_bytes(image_bytes((100, 60), "red"))
    records = []
    for number, (kind, path) in enumerate(films.items()):
        name = f"v{number}.{kind[0]}"
        (folder / name).write_bytes(path.read_bytes())
        records.append(question(f"film{number}", "<video>\nWhat happens?", "It counts.", video=name))
    records.append(question("llava", "<image>\nWhat happens?", "It counts.", video="v0.mp4"))
    records.append(question("plain", "What happens?", "It counts.", video=["v0.mp4", "v1.mp4"]))
    records.append(question("mixed", "<image>\nand <video>What?", "It counts.", "a.png", video="v1.mp4"))
    records.append(question("text", "What is it?", "It is red."))
    return records


@pytest.fixture(scope="module")
def built(films, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    build_dataset(write_jsonl(folder, film_records(folder, films)), folder / "out", samples_per_shard=4)
    return folder / "out"


def data_settings(built, **changes):
    small = {"pack_length": LENGTH, "tile_size": 64, "tokens_per_tile": TOKENS_PER_TILE, "degrade": True}
    return make_settings(built, **{**small, **changes})


def read_epoch(stream, samples=10):
    packs, found = [], 0
    while found < samples:
        packs.append(next(stream))
        assert packs[-1].rejected == []
        found += len(packs[-1].sample_ids)
    assert found == samples
    return packs


def frames_in(pack):
    """(sample id, numbers its frames spell) of each sample of a pack."""
    borders = pack.cu_seqlens.tolist()
    for sample, start, end in zip(pack.sample_ids, borders, borders[1:], strict=False):
        own = (pack.tile_slots >= start) & (pack.tile_slots < end)
        yield sample, [frame_number(tile.permute(1, 2, 0).numpy()) for tile in pack.tiles[own]]


def test_the_shard_holds_the_files(built, films):
    stored = {sample.conversation.id: sample for sample in iterate_samples(built)}
    assert stored["plain"].conversation.turns[0].text == "<video>\n<video>\nWhat happens?"
    assert stored["llava"].conversation.turns[0].text == "<video>\nWhat happens?"
    for number, path in enumerate(films.values()):
        (video,) = stored[f"film{number}"].videos
        assert isinstance(video, FileSlice) and video.read() == path.read_bytes()


def test_frames_reach_the_packs(built, tokenizer):
    """Twenty seconds at 2 frames a second would be 40 frames; a pack of 1024 has room for fewer, spread evenly."""
    for pack in read_epoch(PlannedStream(data_settings(built), tokenizer)):
        for sample, numbers in frames_in(pack):
            text = tokenizer.decode(pack.tokens.tolist())
            if sample.startswith("film"):
                n = len(numbers)
                assert 8 <= n < 40 and numbers == [round(k * 199 / (n - 1)) for k in range(n)]
                assert pack.useful_tokens > LENGTH - 40
                assert f"video of 20.00 seconds at {n / 20:.2f} fps: Frame 1: " in text and f"Frame {n}: " in text
            if sample == "plain":
                assert "The first video" in text and "The second video" in text
            if sample == "mixed":  # an image of 1 tile under this budget, then frames
                assert len(numbers) >= 9 and numbers[1] == 0 and numbers[-1] == 199
            assert bool(numbers) == (sample != "text")


def test_a_larger_pack_samples_more(built, tokenizer):
    """Progressive context: the same data set, only the budget grows; what was rejected or thinned out comes back."""
    frames = []
    for length in (512, 1024, 2048, 4096):
        stream = PlannedStream(data_settings(built, pack_length=length), tokenizer)
        lengths = stream.plan.lengths[0]
        frames.append(lengths.frames)
        if length == 512:
            assert lengths.outcomes["fewer frames"] >= 7 and lengths.outcomes["dropped"] >= 1
            assert "at least 16 are needed" in str(lengths.rejected)
        if length == 4096:
            assert lengths.outcomes == {"whole": 10} and sorted(lengths.frames.tolist())[1:] == [40] * 8 + [80]
    assert all((a <= b).all() for a, b in zip(frames, frames[1:], strict=False))
    assert all(a.sum() < b.sum() for a, b in zip(frames, frames[1:], strict=False))
    whole = PlannedStream(data_settings(built, pack_length=4096), tokenizer)
    numbers = dict(item for pack in read_epoch(whole) for item in frames_in(pack))
    assert numbers["film0"] == [*range(0, 200, 5)]


def test_without_degrading_long_videos_are_rejected(built, tokenizer):
    lengths = PlannedStream(data_settings(built, degrade=False), tokenizer).plan.lengths[0]
    assert len(lengths.rejected) == 9 and all("a pack holds 1024" in reason for reason in lengths.rejected.values())
    few = data_settings(built, degrade=False, video=VideoSettings(max_frames=8))
    assert PlannedStream(few, tokenizer).plan.lengths[0].rejected == {}


def test_a_bound_on_tiles_bounds_frames(built, tokenizer):
    few = data_settings(built, pack_length=4096, max_tiles_per_pack=20)
    lengths = PlannedStream(few, tokenizer).plan.lengths[0]
    assert lengths.rejected == {} and 17 <= lengths.tiles.max() <= 20


def test_frames_of_several_tiles(built, tokenizer):
    tiled = data_settings(built, pack_length=4096, video=VideoSettings(frame_tiles=4, max_frames=10))
    stream = PlannedStream(tiled, tokenizer)
    assert max(pack.tiles.shape[0] for pack in read_epoch(stream)) >= 50  # 4 x 1 and a thumbnail, 10 frames


def test_both_orders_read_the_same_frames(built, tokenizer):
    planned = dict(item for p in read_epoch(PlannedStream(data_settings(built), tokenizer)) for item in frames_in(p))
    buffered = PackStream(data_settings(built, order="buffer", packing_buffer=10, shuffle_buffer=1), tokenizer)
    found = {}
    while len(found) < 10:
        found |= dict(frames_in(next(buffered)))
    assert found == planned


def test_lengths_are_kept_beside_the_shards(built, tokenizer, monkeypatch):
    first = PlannedStream(data_settings(built), tokenizer).plan.lengths[0]
    monkeypatch.setattr("megatron_eagle.data.order.lengths._lengths", None)
    again = PlannedStream(data_settings(built, plan_window=7), tokenizer).plan.lengths[0]
    assert (
        (again.tokens == first.tokens).all() and again.outcomes == first.outcomes and again.rejected == first.rejected
    )
    with pytest.raises(TypeError):
        PlannedStream(data_settings(built, tokens_per_tile=17), tokenizer)


def test_a_video_that_rots_moves_no_other_sample(built, tokenizer, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    whole = read_epoch(PlannedStream(data_settings(copy), tokenizer))
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"mdat") + 4
    data[at : at + 3000] = bytes(3000)
    shard.write_bytes(data)
    stream = PlannedStream(data_settings(copy), tokenizer)
    packs = [next(stream) for _ in whole]
    rejected = [item for pack in packs for item in pack.rejected]
    assert sum(len(pack.sample_ids) for pack in packs) + len(rejected) == 10 and 1 <= len(rejected) <= 2
    bad = {sample for sample, _ in rejected}
    assert [[i for i in p.sample_ids if i not in bad] for p in whole] == [p.sample_ids for p in packs]


@pytest.mark.long
def test_progressive_context_trains_on_videos(built, small_run, tmp_path):
    """Two stages over one data set, the second with packs twice as long: more frames, finite losses, no sample lost."""
    stage = {"steps": 3, "batch": 2, "learning_rate": 1e-3, "blend": [{"path": str(built)}], "trainable": ["connector"]}
    stages = [{**stage, "name": f"s{length}", "pack_length": length} for length in (1024, 2048)]
    recipe = small_run.write_recipe(tmp_path / "recipe.yaml", stages=stages, reading={"degrade": True})
    frames = []
    for each in stages:
        command = [sys.executable, "-m", "megatron_eagle", "train", str(recipe), "--runs", str(tmp_path / "runs")]
        done = subprocess.run([*command, "--stage", each["name"]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines())
        steps = [step for step in lines if step["stage"] == each["name"]]
        assert len(steps) == 3 and all(np.isfinite(step["loss"]) and not step["rejected"] for step in steps)
        command = [sys.executable, "-m", "megatron_eagle", "data", "measure", str(recipe), "--stage", each["name"]]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        frames.append(int(re.search(r"(\d+) frames", said)[1]))
    assert frames[0] < frames[1]
