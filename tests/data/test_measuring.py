"""Measuring by shards: in parts and after a kill the same bytes, and of shards that join only these are read."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from samples import make_dataset, make_tokenizer, question, write_jsonl

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.index import write_index
from megatron_eagle.data.build.measure import MeasureReport, measure_shards
from megatron_eagle.data.build.part import Part
from megatron_eagle.data.order.measuring import TextOf, open_sample_index, text_tokens
from megatron_eagle.data.order.shard_stamps import stamp_shards
from megatron_eagle.data.sample.tokenizer import SentencePieceTokenizer
from megatron_eagle.errors import UserError

SHARDS, SYSTEM = 5, "You look at pictures."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SentencePieceTokenizer]:
    """Shards as another program makes them, one with a sample that is broken, and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    built = make_dataset(folder / "set", 23, samples_per_shard=5)
    shutil.rmtree(built / ".eagle-meta")
    shard = built / "shard-000001.tar"
    data = shard.read_bytes()
    begin = data.index(b"\x89PNG")
    shard.write_bytes(data[:begin] + bytes(8) + data[begin + 8 :])
    write_index(built, sorted(path.name for path in built.glob("*.tar")))
    return built, make_tokenizer(folder)


def measured(folder: Path, tokenizer: SentencePieceTokenizer) -> dict[str, bytes]:
    """What is kept beside the shards, when all is put together."""
    index = open_sample_index(folder)
    assert len(text_tokens(index, tokenizer, SYSTEM)) == len(index)
    kept = folder / ".eagle-meta"
    return {str(path.relative_to(kept)): path.read_bytes() for path in sorted(kept.rglob("*")) if path.is_file()}


def with_shards(source: Path, folder: Path, *numbers: int) -> Path:
    """A data set of these shards of ``source``, with its own index and as old as they are; it may be there already."""
    folder.mkdir(exist_ok=True)
    names = [f"shard-{number:06d}.tar" for number in numbers]
    for name in names:
        shutil.copy2(source / name, folder / name)
    shutil.rmtree(folder / ".nv-meta", ignore_errors=True)
    write_index(folder, names)
    return folder


def make_unreadable(shard: Path) -> None:
    """Zeros, as long and as old as the shard was: whoever reads it says so."""
    found = shard.stat()
    shard.write_bytes(bytes(found.st_size))
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_parts_in_any_order_make_the_same_bytes(world: Any, tmp_path: Path) -> None:
    source, tokenizer = world
    text = TextOf(tokenizer, SYSTEM)
    whole = measured(shutil.copytree(source, tmp_path / "whole"), tokenizer)
    assert len(whole) == 11  # eight arrays of the index and its description, text and its description
    assert b'"broken": {"' in whole["samples-3/samples.json"]
    for parts in (2, 7):
        folder = shutil.copytree(source, tmp_path / f"in-{parts}")
        own = [len(range(number, SHARDS, parts)) for number in range(parts)]
        for number in reversed(range(1, parts + 1)):
            report = measure_shards([str(folder)], text, part=Part(number, parts))
            assert report == MeasureReport(due=SHARDS, own=own[number - 1], now=own[number - 1])
        for shard in folder.glob("*.tar"):
            make_unreadable(shard)  # all that is wanted of them is there
        assert measure_shards([str(folder)], text) == MeasureReport(due=SHARDS, own=SHARDS, now=0)
        assert measured(folder, tokenizer) == whole
        assert measure_shards([str(folder)], text) == MeasureReport(0, 0, 0)


def test_what_was_measured_before_a_kill_is_not_read_again(world: Any, tmp_path: Path) -> None:
    source, tokenizer = world
    text = TextOf(tokenizer, SYSTEM)
    folder = shutil.copytree(source, tmp_path / "set")
    cut = folder / "shard-000003.tar"
    whole = cut.read_bytes()
    stat = cut.stat()
    make_unreadable(cut)
    with pytest.raises(UserError, match=r"shard-000003\.tar: "):
        measure_shards([str(folder)], text)
    cut.write_bytes(whole)
    os.utime(cut, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for number in range(3):
        make_unreadable(folder / f"shard-{number:06d}.tar")
    assert measure_shards([str(folder)], text) == MeasureReport(due=SHARDS, own=SHARDS, now=2)
    assert measured(folder, tokenizer) == measured(shutil.copytree(source, tmp_path / "anew"), tokenizer)


@pytest.mark.parametrize(
    "before, after", [((0, 1, 2), (0, 1, 2, 3)), ((1, 3), (0, 1, 2, 3, 4)), ((0, 1, 2, 3), (0, 4, 2))]
)
def test_of_shards_that_join_only_these_are_read(world: Any, tmp_path: Path, before: Any, after: Any) -> None:
    source, tokenizer = world
    folder = with_shards(source, tmp_path / "set", *before)
    measured(folder, tokenizer)
    with_shards(source, folder, *after)
    for number in before:
        make_unreadable(folder / f"shard-{number:06d}.tar")
    new = len(set(after) - set(before))
    text = TextOf(tokenizer, SYSTEM)
    assert measure_shards([str(folder)], text) == MeasureReport(due=new, own=new, now=new)
    found, anew = measured(folder, tokenizer), measured(with_shards(source, tmp_path / "anew", *after), tokenizer)
    assert {name: found[name] for name in anew} == anew


def test_a_shard_that_was_changed_is_read_again(world: Any, tmp_path: Path) -> None:
    source, tokenizer = world
    folder = with_shards(source, tmp_path / "set", 0, 1)
    measured(folder, tokenizer)
    shutil.copyfile(source / "shard-000002.tar", folder / "shard-000001.tar")
    write_index(folder, ["shard-000000.tar", "shard-000001.tar"])
    assert [open_sample_index(folder).ids[n] for n in (0, 5)] == ["s0", "s10"]


def test_a_shard_that_was_built_here_is_known_by_its_bytes_and_not_by_its_age(tmp_path: Path) -> None:
    stamps = []
    for number, word in enumerate(("cat", "cat", "dog")):
        folder = tmp_path / str(number)
        folder.mkdir()
        built = folder / "built"
        build_dataset(write_jsonl(folder, [question(f"s{n}", "What?", word) for n in range(3)]), built)
        os.utime(built / "shard-000000.tar", ((0, 9, 0)[number],) * 2)
        stamps += stamp_shards(built)
    cat, same, dog = stamps
    assert cat == same != dog and cat.size == dog.size


@pytest.mark.slow
def test_processes_share_the_shards(world: Any, tmp_path: Path) -> None:
    source, tokenizer = world
    folder = shutil.copytree(source, tmp_path / "set")
    text = TextOf(tokenizer, SYSTEM)
    assert measure_shards([str(folder)], text, workers=2).now == SHARDS
    assert measured(folder, tokenizer) == measured(shutil.copytree(source, tmp_path / "anew"), tokenizer)


def test_a_folder_in_which_nothing_can_be_kept_is_said(world: Any, tmp_path: Path) -> None:
    source, tokenizer = world
    folder = shutil.copytree(source, tmp_path / "set")
    (folder / ".eagle-meta").write_bytes(b"in the way")
    with pytest.raises(UserError, match=r"set: nothing can be written there to keep what was measured"):
        measure_shards([str(folder)], TextOf(tokenizer, SYSTEM))
    assert len(open_sample_index(folder)) == 23
