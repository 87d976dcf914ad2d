"""Thousands of damaged samples and shards: nothing crashes or hangs, and read = used + rejected."""

import json
import random
import shutil

import pytest
from samples import make_dataset, make_records, make_settings, make_tokenizer, question, write_video

from megatron_eagle.config.reading import VideoSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.frames import frame_times, frame_words, wanted_frames
from megatron_eagle.data.media.video import VideoReader
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.data.stream.streams import PackStream
from megatron_eagle.errors import BrokenSample, UserError

FAST, LONG = 120, 10_000
SAMPLES = 40  # of the data set whose shards are damaged
STRANGE = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\0", "\ud800", "<image>", "<image>" * 300,
    "../../etc/passwd", "x" * 5000, [], {}, [[]], [None], ["0.png"] * 20, {"from": "gpt"}, {"a": {"b": {}}}, "\u2581",
    [{"from": "human", "value": 3}], [{"from": "gpt", "value": "<|im_end|>"}], [{"from": "system", "value": "s"}] * 3,
]  # fmt: skip


def mutate_record(rng, record):
    """A record with one to three of its values, keys or turns replaced, removed or doubled."""
    record = json.loads(json.dumps(record))
    for _ in range(rng.randint(1, 3)):
        where = rng.choice([record, *[turn for turn in record.get("conversations") or [] if isinstance(turn, dict)]])
        key = rng.choice([*where, "id", "image", "conversations", "from", "value"])
        match rng.randrange(4):
            case 0:
                where[key] = rng.choice(STRANGE)
            case 1:
                where.pop(key, None)
            case 2:
                turns = record.get("conversations")
                if isinstance(turns, list) and turns:
                    turns.insert(rng.randrange(len(turns) + 1), rng.choice([*turns, *STRANGE]))
            case 3 if isinstance(where.get(key), str):
                where[key] = where[key][: rng.randrange(len(where[key]) + 1)] + str(rng.choice(STRANGE))
        if not isinstance(record.get("conversations"), list):
            break
    return record


def mutate_bytes(rng, data):
    """Bytes flipped, cut off, overwritten, moved or doubled."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                for at in range(place, min(len(data), place + rng.randint(1, 3))):
                    data[at] = rng.randrange(256)
            case 1:
                del data[place:]
            case 2:
                data[place : place + 50] = rng.randbytes(50)
            case 3:
                del data[place : place + rng.randint(1, 600)]
            case 4:
                data[place:place] = data[: rng.randint(0, 600)]
    return bytes(data)


def damage_lines(folder, count, seed):
    rng = random.Random(seed)
    records = make_records(folder, 60, "r")
    images = [folder / name for record in records for name in record["image"]]
    lines = []
    for number in range(count):
        record = dict(rng.choice(records), id=f"m{number}")
        if rng.random() < 0.4 and record["image"]:
            name = f"broken-{number}"
            (folder / name).write_bytes(mutate_bytes(rng, rng.choice(images).read_bytes()))
            record = question(f"m{number}", "<image>\nWhat?", "Red.", name)
        else:
            record = mutate_record(rng, record)
        line = json.dumps(record).encode()
        lines.append(mutate_bytes(rng, line).replace(b"\n", b" ") or b"x" if rng.random() < 0.2 else line)
    (folder / "fuzz.jsonl").write_bytes(b"".join((line if line.strip() else b"{") + b"\n" for line in lines))
    return folder / "fuzz.jsonl"


def lines_add_up(folder, tokenizer, count, seed):
    jsonl = damage_lines(folder, count, seed)
    report = build_dataset(jsonl, folder / "built", max_rejected=count, max_pixels=4_000_000)
    rejected = [json.loads(line) for line in (folder / "built" / "rejected.jsonl").read_text().splitlines()]
    assert report.read == count == report.written + report.rejected and len(rejected) == report.rejected > count // 10
    assert all(entry["reason"] and entry["line"] for entry in rejected) and report.written > count // 10
    assert read_epoch(folder / "built", tokenizer) == report.written


def read_epoch(dataset, tokenizer):
    """Samples used and rejected in one epoch, together."""
    settings = make_settings(dataset, pack_length=512, tile_size=64, tokens_per_tile=16, max_pixels=4_000_000)
    stream = PlannedStream(settings, tokenizer)
    total = 0
    for _ in range(stream.plan.first_of_epoch(1)):
        pack = next(stream)
        assert all(sample and reason for sample, reason in pack.rejected)
        total += len(pack.sample_ids) + len(pack.rejected)
    return total


def shards_add_up(folder, tokenizer, rounds, seed):
    rng = random.Random(seed)
    whole = make_dataset(folder / "whole", SAMPLES)
    assert read_epoch(whole, tokenizer) == SAMPLES  # and makes the sample_index
    for number in range(rounds):
        copy = folder / f"copy{number}"
        shutil.copytree(whole, copy)
        for shard in sorted(copy.glob("*.tar")):
            shard.write_bytes(mutate_bytes(rng, shard.read_bytes()))
        assert read_epoch(copy, tokenizer) == SAMPLES
        foreign = rng.random() < 0.3
        if foreign:  # as if another program had made it: the sample_index is made from the damaged shards
            shutil.rmtree(copy / ".eagle-meta")
            try:
                read_epoch(copy, tokenizer)
            except UserError as error:
                assert "\n" not in str(error)
        shutil.rmtree(copy)


def videos_end_well(folder, count, seed):
    """Every damaged video gives all frames asked for, or a reason of one line."""
    rng, chosen = random.Random(seed), VideoSettings(max_frames=16)
    kinds = [("mp4", "mpeg4"), ("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("ts", "libx264")]
    films = [write_video(folder / f"{codec}.{ending}", 60, codec=codec).read_bytes() for ending, codec in kinds]
    read = used = rejected = 0
    for _ in range(count):
        read += 1
        try:
            with VideoReader(mutate_bytes(rng, rng.choice(films)), max_pixels=4_000_000) as reader:
                times = frame_times(chosen, reader.info, wanted_frames(chosen, reader.info))
                assert len([*reader.frames(times)]) == len(frame_words(chosen, 0, reader.info, times))
            used += 1
        except BrokenSample as error:
            assert str(error) and "\n" not in str(error)
            rejected += 1
    assert read == used + rejected and used > count // 10 and rejected > count // 10


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("fuzz"))


def test_damaged_lines_and_images(tokenizer, tmp_path):
    lines_add_up(tmp_path, tokenizer, FAST, seed=0)


def test_damaged_shards(tokenizer, tmp_path):
    shards_add_up(tmp_path, tokenizer, FAST // SAMPLES, seed=0)


def test_damaged_videos(tmp_path):
    videos_end_well(tmp_path, FAST, seed=0)


@pytest.mark.long
def test_10_000_damaged_videos(tmp_path):
    videos_end_well(tmp_path, LONG, seed=1)


@pytest.mark.long
def test_10_000_damaged_lines_and_images(tokenizer, tmp_path):
    for part in range(10):
        (tmp_path / str(part)).mkdir()
        lines_add_up(tmp_path / str(part), tokenizer, LONG // 10, seed=part + 1)


@pytest.mark.long
def test_10_000_samples_in_damaged_shards(tokenizer, tmp_path):
    shards_add_up(tmp_path, tokenizer, LONG // SAMPLES, seed=1)


def test_buffered_stream_survives_damaged_bodies(tokenizer, tmp_path):
    """Energon itself walks through the tar headers here, so only what lies between them is damaged."""
    import tarfile

    rng = random.Random(3)
    whole = make_dataset(tmp_path / "whole", SAMPLES)
    for shard in whole.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            for member in tar:
                if rng.random() < 0.3:
                    span = slice(member.offset_data, member.offset_data + member.size)
                    data[span] = mutate_bytes(rng, bytes(data[span])).ljust(member.size, b" ")[: member.size]
        shard.write_bytes(data)
    settings = make_settings(
        whole, pack_length=512, tile_size=64, tokens_per_tile=16, max_pixels=4_000_000,
        order="buffer", packing_buffer=SAMPLES, shuffle_buffer=1,
    )  # fmt: skip
    stream = PackStream(settings, tokenizer)
    used = rejected = 0
    while used + rejected < SAMPLES:
        pack = next(stream)
        used, rejected = used + len(pack.sample_ids), rejected + len(pack.rejected)
    assert rejected > 3 and used > 3
