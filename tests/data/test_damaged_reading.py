"""Shards that are damaged while a run reads them, or before it begins: one line with shard and sample, no traceback."""

import shutil
import tarfile

import pytest
from samples import make_dataset, make_settings, make_tokenizer

from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.data.stream.streams import PackStream
from megatron_eagle.errors import UserError

SHARD = "shard-000001.tar"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twenty samples in shards of five, as many of other names, and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    sets = (make_dataset(folder / name, 20, prefix=name, samples_per_shard=5) for name in "st")
    return make_tokenizer(folder), *sets


def copied(world, tmp_path):
    _, source, _ = world
    return shutil.copytree(source, tmp_path / "set")


def begin_of(shard, number):
    with tarfile.open(shard) as tar:
        return tar.getmembers()[number].offset


def reasons(world, folder):
    """Of an epoch of packs; all samples fit."""
    tokenizer, *_ = world
    stream = PlannedStream(make_settings(folder, pack_length=8192), tokenizer)
    packs = [next(stream) for _ in range(stream.plan.first_of_epoch(1))]
    assert sum(len(pack.sample_ids) + len(pack.rejected) for pack in packs) == 20
    return dict(item for pack in packs for item in pack.rejected)


def test_another_shard_is_named_for_each_sample(world, tmp_path):
    folder = copied(world, tmp_path)
    reasons(world, folder)  # text is counted, as it is before a run
    shutil.copy(world[2] / SHARD, folder / SHARD)
    found = reasons(world, folder)
    assert found.keys() == {f"s{n}" for n in range(5, 10)}
    assert all(reason.endswith(f" ({SHARD}: 00000000{name[1:]}-{name})") for name, reason in found.items()), found
    assert any("sample 't6' is in its place: the shard was changed" in reason for reason in found.values())


@pytest.mark.parametrize("content", [b"junk" * 2000, b""])
def test_a_damaged_index_rejects_and_does_not_end_in_a_traceback(world, tmp_path, content):
    folder = copied(world, tmp_path)
    reasons(world, folder)
    (folder / ".nv-meta" / "index.sqlite").write_bytes(content)
    found = reasons(world, folder)
    assert len(found) == 20 and all("\n" not in reason and "cannot be read" in reason for reason in found.values())


@pytest.mark.parametrize("place", ["header", "cut"])
def test_a_tar_that_merely_seems_shorter_is_refused(world, tmp_path, place):
    folder = copied(world, tmp_path)
    begin = begin_of(folder / SHARD, 3)
    data = bytearray((folder / SHARD).read_bytes())
    if place == "cut":
        del data[begin:]
    else:
        data[begin + 2] ^= 1
    (folder / SHARD).write_bytes(data)
    said = rf"{SHARD}: ends after 1 of 5 samples, the last is '000000005-s5'; 'megatron-eagle data check {folder}' says"
    with pytest.raises(UserError, match=said):
        reasons(world, folder)  # its text has not been counted
    with pytest.raises(UserError, match=said):
        list(iterate_samples(folder))
    shutil.rmtree(folder / ".eagle-meta")
    with pytest.raises(UserError, match=said):
        reasons(world, folder)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_buffered_stream_says_which_shard(world, tmp_path, workers):
    tokenizer, folder = world[0], copied(world, tmp_path)
    with open(folder / SHARD, "r+b") as file:
        file.truncate(begin_of(folder / SHARD, 3) + 700)
    settings = make_settings(folder, pack_length=8192, order="buffer", packing_buffer=8, shuffle_buffer=8)
    stream = PackStream(settings, tokenizer, workers=workers)
    with pytest.raises(
        UserError, match=r"a shard of \S+ is damaged: .*nexpected end of \w+.*; 'megatron-eagle data check.*"
    ) as caught:
        for _ in range(20):
            next(stream)
    assert "\n" not in str(caught.value)
    stream.close()
