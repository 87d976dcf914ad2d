"""Samples by key: one read for what lies together, videos in place, and a bounded number of open files."""

import os
import shutil
import tarfile

import pytest
from samples import make_dataset, question, write_jsonl, write_video

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.order.measuring import open_sample_index
from megatron_eagle.data.storage.shards import iterate_entries, shard_counts
from megatron_eagle.data.stream import sample_files
from megatron_eagle.data.stream.sample_files import SampleFiles


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("samples") / "set", 12, samples_per_shard=5)


@pytest.fixture
def stretches(monkeypatch):
    """What is read of shards, as (shard, first byte, bytes)."""
    found, read = [], sample_files.read_stretch

    def noted(file, offset, size):
        found.append((file.name, offset, size))
        return read(file, offset, size)

    monkeypatch.setattr(sample_files, "read_stretch", noted)
    return found


def test_a_sample_is_what_the_shard_holds_in_one_read(built, stretches):
    files, samples = SampleFiles(), 0
    for shard, count in shard_counts(built).items():
        for key, entry in iterate_entries(built / shard, count):
            assert files.read(built, key) == entry and files.shard_of(built, key) == shard
            samples += 1
    assert samples == len(stretches) == 12
    with pytest.raises(KeyError):
        files.read(built, "000000000-nobody")


def test_a_video_is_not_read(tmp_path, stretches):
    write_video(tmp_path / "a.mp4", 40)
    record = question("f", "<video>What?", "It.", video="a.mp4")
    folder = tmp_path / "set"
    build_dataset(write_jsonl(tmp_path, [record]), folder)
    (key,) = open_sample_index(folder).keys
    video = SampleFiles().read(folder, key)["v0.mp4"]
    assert isinstance(video, FileSlice) and video.read() == (tmp_path / "a.mp4").read_bytes()
    with tarfile.open(folder / "shard-000000.tar") as tar:
        record_size = next(member.size for member in tar if member.name.endswith(".json"))
    assert [size for _, _, size in stretches] == [record_size]


def test_a_shard_that_ends_before_the_sample_does_is_an_error(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "set")
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.truncate(700)
    with pytest.raises(OSError, match="ends [0-9]+ bytes before it should"):
        SampleFiles().read(folder, open_sample_index(folder).keys[0])


def test_no_more_indexes_are_open_than_the_bound_says(built, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_files, "MOST_OPEN", 3)
    folders = [shutil.copytree(built, tmp_path / str(number)) for number in range(8)]
    key = open_sample_index(built).keys[0]
    files, before = SampleFiles(), len(os.listdir("/proc/self/fd"))
    for folder in [*folders, *folders]:
        assert files.read(folder, key)["json"]
        assert len(os.listdir("/proc/self/fd")) - before <= 3
    assert len(os.listdir("/proc/self/fd")) - before == 3
