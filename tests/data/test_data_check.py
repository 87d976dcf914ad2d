"""``data check``: whatever byte, shard or index of a data set is wrong, it is found, and named where that can be."""

import contextlib
import json
import random
import re
import shutil
import sqlite3
import tarfile
import uuid

import numpy as np
import pytest
from PIL import Image
from samples import make_records, question, write_jsonl, write_video

from megatron_eagle.cli import main
from megatron_eagle.data.build.dataset import Part, build_dataset, join_parts
from megatron_eagle.data.build.index import check_dataset
from megatron_eagle.data.reports import damage
from megatron_eagle.data.reports.damage import check_damage
from megatron_eagle.data.reports.shard_check import ShardTask, check_shard
from megatron_eagle.data.storage.checksums import CHECKSUMS_FOLDER, MEMBER, open_checksums
from megatron_eagle.data.storage.shards import shard_counts

FIRST, SECOND, LAST = (f"shard-{number:06d}.tar" for number in range(3))
NOT_AS_BUILT = "the shards together are not the bytes that were built, by the SHA-256 in .nv-meta/index.uuid"
NOTHING_WRONG = "10 samples in 3 shards: 10 good, 0 damaged"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten samples in shards of four: texts, one and two images, and last a video."""
    folder = tmp_path_factory.mktemp("whole")
    write_video(folder / "film.mp4", 20)
    film = {**question("film", "<video>What?", "Bars."), "video": "film.mp4"}
    build_dataset(write_jsonl(folder, [*make_records(folder, 9), film]), folder / "set", samples_per_shard=4)
    return folder / "set"


@pytest.fixture
def data(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "set")


def without_checksums(folder):
    """As it was built before there were any."""
    shutil.rmtree(folder / CHECKSUMS_FOLDER)
    return folder


@pytest.fixture
def old(data):
    return without_checksums(data)


@pytest.fixture(params=["checksums", "no checksums"])
def either(request, data):
    """A data set of both kinds, for damage that is found in either, with the same words."""
    return data if request.param == "checksums" else without_checksums(data)


@contextlib.contextmanager
def flipped(path, place, by=1):
    """One byte is another one for a while."""
    right = path.read_bytes()
    path.write_bytes(right[:place] + bytes([right[place] ^ by]) + right[place + 1 :])
    yield
    path.write_bytes(right)


def overwrite(path, place, data):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


def members_of(shard):
    """(name, where its header begins, where its content does, end with padding) of each."""
    with tarfile.open(shard) as tar:
        return [(m.name, m.offset, m.offset_data, m.offset_data + -(-m.size // 512) * 512) for m in tar]


def member(shard, ending):
    return next(found for found in members_of(shard) if found[0].endswith(ending))


def checked(folder, *, lines=None, damaged=None):
    """The report of a data set; lines: patterns, of all its lines but the one on the identity."""
    report = check_damage(folder)
    assert not any("\n" in line for line in report.lines) and len(report.lines) == report.findings
    if lines is not None:
        found = [line for line in report.lines if line != NOT_AS_BUILT]
        assert len(found) == len(lines), found
        for pattern, line in zip(lines, found, strict=True):
            assert re.fullmatch(pattern, line), line
    assert damaged is None or report.damaged == damaged, report
    return report


def test_what_was_built_is_whole(either):
    report = checked(either, lines=[], damaged=0)
    assert report.summary == NOTHING_WRONG and report.findings == report.doubts == 0
    assert report.compared == (3 if (either / CHECKSUMS_FOLDER).exists() else 0)
    assert check_dataset(either) == 10  # Energon does not mind the files


def test_checksums_take_eight_bytes_a_member(data):
    members = sum(len(members_of(data / shard)) for shard in (FIRST, SECOND, LAST))
    assert (data / CHECKSUMS_FOLDER / "members.bin").stat().st_size == members * MEMBER.itemsize == members * 8


def test_every_changed_byte_is_found_and_its_member_named(data):
    drawn, sums = random.Random(0), open_checksums(data)
    for number, (shard, promised) in enumerate(shard_counts(data).items()):
        task = ShardTask(data, shard, number, promised, sums[shard], 100)
        members, size = members_of(data / shard), (data / shard).stat().st_size
        for _ in range(70):
            place = drawn.randrange(size)
            with flipped(data / shard, place, drawn.randrange(1, 256)):
                fate = check_shard(task)
            (line,) = fate.lines
            owner = next((name for name, begin, _, end in members if begin <= place < end), None)
            if owner is None:
                assert fate.damaged == 0 and line.startswith("holds something behind its last sample"), (place, line)
            else:
                key = owner.partition(".")[0]
                assert fate.damaged == 1 and line.startswith(f"sample {key}: {owner} at byte "), (place, line)
        assert check_shard(task).findings == 0


def test_every_changed_byte_is_noticed_without_checksums(old):
    drawn = random.Random(1)
    for shard in (FIRST, SECOND, LAST):
        for _ in range(7):
            with flipped(old / shard, drawn.randrange((old / shard).stat().st_size), 1 << drawn.randrange(8)):
                assert checked(old).lines[-1] == NOT_AS_BUILT
    assert checked(old).findings == 0


@pytest.mark.parametrize(
    ("shard", "ending", "inside", "what"),
    [
        (FIRST, "-s0.json", 20, "its bytes are not those that were built"),
        (FIRST, "-s1.json", -512, "its tar header is damaged"),  # its name
        (FIRST, "-s3.0.png", -512 + 124, "its tar header is damaged"),  # its size
        (FIRST, "-s3.0.png", 60, "its bytes are not those that were built"),
        (LAST, "-film.v0.mp4", 900, "its bytes are not those that were built"),
        (LAST, "-film.json", 511, "its bytes are not those that were built"),  # its padding
    ],
)
def test_a_changed_byte_names_the_member(data, shard, ending, inside, what):
    name, begin, first, _ = member(data / shard, ending)
    with flipped(data / shard, first + inside):
        place = f"{shard}: sample {name.partition('.')[0]}: {name} at byte {begin}"
        checked(data, lines=[rf"{place}: {what} \(CRC-32 \w{{8}}, was \w{{8}}\)"], damaged=1)


def test_a_picture_of_noise_is_found_without_checksums(tmp_path):
    """400 bytes of a JPEG: in its headers it cannot be opened, behind them it decodes, and libjpeg warns."""
    pixels = np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    lines = [question(f"s{n}", "<image>What?", "Noise.", "a.jpg") for n in range(3)]
    build_dataset(write_jsonl(tmp_path, lines), tmp_path / "set")
    old = without_checksums(tmp_path / "set")
    _, _, first, _ = member(old / FIRST, "-s1.0.jpg")
    right = (old / FIRST).read_bytes()
    overwrite(old / FIRST, first + 100, b"\x55" * 400)
    checked(old, lines=[f"{FIRST}: sample 000000001-s1: 000000001-s1.0.jpg: .*"], damaged=1)
    (old / FIRST).write_bytes(right)
    overwrite(old / FIRST, first + 4000, b"\0" * 400)
    report = checked(old, lines=[], damaged=0)
    assert report.lines == (NOT_AS_BUILT,) and report.doubts == 1
    assert "000000001-s1.0.jpg: decodes, and libjpeg warns: " in report.doubtful[0]


def test_records_pictures_and_films_that_cannot_be_read_are_named_without_checksums(old):
    for shard, ending, data in ((FIRST, "-s0.json", b"!"), (FIRST, "-s3.0.png", b"x" * 9), (LAST, ".mp4", b"x" * 200)):
        overwrite(old / shard, member(old / shard, ending)[2], data)
    lines = [
        f"{FIRST}: sample 000000000-s0: 000000000-s0.json: not JSON.*",
        f"{FIRST}: sample 000000003-s3: 000000003-s3.0.png: not an image.*",
        f"{LAST}: sample 000000009-film: 000000009-film.v0.mp4: video cannot be (opened|read).*",
    ]
    checked(old, lines=lines, damaged=3)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_header_that_is_gone_is_one_sample(either, blocks):
    """Overwritten with zeros it looks like the end of the tar."""
    name, begin, _, _ = member(either / FIRST, "-s1.json")
    overwrite(either / FIRST, begin, (b"\0" * 512 * blocks) or b"\xff" * 512)
    line = rf"{FIRST}: sample 000000001-s1: {name} at byte {begin}: its tar header is damaged.*"
    checked(either, lines=[line], damaged=1)


@pytest.mark.parametrize("ending", ["-s2.json", "-s3.json", "-s3.0.png", "-s0.json"])
@pytest.mark.parametrize("inside", [0, 512, 700])
def test_a_cut_shard_names_the_first_sample_that_is_gone(either, ending, inside):
    name, begin, _, _ = member(either / FIRST, ending)
    with open(either / FIRST, "r+b") as file:
        file.truncate(begin + inside)
    gone = sum(key >= name.partition(".")[0] for key, *_ in members_of_samples(either))
    more = f" and {gone - 1} more" if gone > 1 else ""
    line = rf"{FIRST}: is cut off at byte {begin + inside}, \d+ are due: sample {name.partition('.')[0]}{more} cannot.*"
    checked(either, lines=[line], damaged=gone)


def members_of_samples(folder):
    """(key,) of each sample of the first shard, by the index."""
    with contextlib.closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as database:
        return database.execute("SELECT sample_key FROM samples WHERE tar_file_id = 0").fetchall()


def test_an_end_that_is_gone_takes_no_sample(either):
    end = members_of(either / FIRST)[-1][3]
    with open(either / FIRST, "r+b") as file:
        file.truncate(end + 512)
    checked(either, lines=[rf"{FIRST}: has {end + 512} bytes, \d+ are due; its samples end at byte {end}"], damaged=0)


def test_exchanged_shards_name_each_other(either):
    (either / FIRST).rename(either / "x")
    (either / SECOND).rename(either / FIRST)
    (either / "x").rename(either / SECOND)
    lines = [
        rf"{FIRST}: is the file of {SECOND}, which begins with 000000004-s4.json: none of its 4 samples is right; .*",
        rf"{SECOND}: is the file of {FIRST}, which begins with 000000000-s0.json: none of its 4 samples is right; .*",
    ]
    checked(either, lines=lines, damaged=8)


@pytest.mark.parametrize("count", [4, 40])
def test_a_shard_of_another_data_set(either, tmp_path, count):
    (tmp_path / "other").mkdir()
    lines = [question(f"t{n}", "What?", "That.") for n in range(count)]
    build_dataset(write_jsonl(tmp_path / "other", lines), tmp_path / "built")
    shutil.copy(tmp_path / "built" / FIRST, either / SECOND)
    begin = "is a file of another data set, which begins with 000000000-t0.json"
    checked(either, lines=[rf"{SECOND}: {begin}: none of its 4 samples is right; 000000004-s4 .*"], damaged=4)


def test_missing_shards_and_strange_ones(either):
    (either / SECOND).unlink()
    (either / "shard-000007.tar").write_bytes(b"")
    shutil.rmtree(either / "none", ignore_errors=True)
    lines = [f"{SECOND}: is missing, with 4 samples", r"shard-000007.tar: is no shard of this data set.*"]
    checked(either, lines=lines, damaged=4)
    (either / SECOND).mkdir()
    checked(either, lines=[f"{SECOND}: cannot be read: Is a directory; .* 4 samples", lines[1]], damaged=4)


def test_borders_of_another_shard(either):
    shutil.copy(either / f"{SECOND}.idx", either / f"{FIRST}.idx")
    (either / f"{LAST}.idx").unlink()
    lines = [
        rf"{FIRST}: {FIRST}.idx does not belong to it: border \d is byte \d+, \d+ is due",
        rf"{LAST}: {LAST}.idx cannot be read: No such file or directory",
    ]
    checked(either, lines=lines, damaged=0)
    (either / f"{FIRST}.idx").write_bytes(b"12345")
    checked(either, lines=[rf"{FIRST}: {FIRST}.idx does not.*: 1 borders of samples, 5 are due", lines[1]], damaged=0)


def test_counts_that_disagree(either):
    info = json.loads((either / ".nv-meta" / ".info.json").read_text())
    info["shard_counts"][FIRST] = 5
    (either / ".nv-meta" / ".info.json").write_text(json.dumps(info))
    lines = [
        r".nv-meta/index.sqlite: has 10 samples, .info.json has 11",
        rf"{FIRST}: the index has 4 samples of it, .info.json has 5",
    ]
    assert checked(either, lines=lines).summary == "11 samples in 3 shards: 10 good, 1 damaged"
    del info["shard_counts"][FIRST]
    (either / ".nv-meta" / ".info.json").write_text(json.dumps(info))
    said = checked(either).lines
    assert any(line.startswith(f"{FIRST}: ") for line in said), said


def test_an_index_of_another_data_set(either, tmp_path):
    (tmp_path / "other").mkdir()
    lines = [question(f"t{n}", "What?", "That.") for n in range(10)]
    build_dataset(write_jsonl(tmp_path / "other", lines), tmp_path / "built", samples_per_shard=4)
    shutil.copy(tmp_path / "built" / ".nv-meta" / "index.sqlite", either / ".nv-meta" / "index.sqlite")
    whose = "is as it was built, and index.sqlite of other shards"
    if not (either / CHECKSUMS_FOLDER).exists():
        whose = "is a file of another data set, which begins with 000000000-s0.json"
    said = checked(either, damaged=10).lines
    assert said[0] == f"{FIRST}: {whose}: none of its 4 samples is right; 000000000-t0 should be the first"


@pytest.mark.parametrize("content", [None, b"", b"nonsense" * 1000])
def test_without_an_index_the_shards_are_still_read(either, content):
    index = either / ".nv-meta" / "index.sqlite"
    index.unlink()
    if content is not None:
        index.write_bytes(content)
    trouble = r".nv-meta/index.sqlite: cannot be read: [^\n]*"
    checked(either, lines=[trouble], damaged=0)
    name, begin, first, _ = member(either / FIRST, "-s1.json")
    with flipped(either / FIRST, first, by=255):
        said = rf"{FIRST}: sample 000000001-s1: {name}( at byte {begin})?: .*"
        checked(either, lines=[trouble, said], damaged=1)
    overwrite(either / FIRST, begin, b"\xff" * 512)
    assert checked(either).damaged >= 1


def test_damaged_checksums_are_said_and_not_used(data):
    for name, said in (("members.bin", "not those that were written"), ("shards.json", "cannot be read")):
        with flipped(data / CHECKSUMS_FOLDER / name, 3, by=0xF0):
            report = checked(data, lines=[rf"checksums not used: .*{said}.*"], damaged=0)
            assert report.compared == 0


def test_a_random_identity_says_nothing_of_bytes(old):
    """As Energon's own ``prepare`` draws it."""
    (old / ".nv-meta" / "index.uuid").write_text("0b1c2d3e-aaaa-4bbb-8ccc-123456789abc")
    assert uuid.UUID("0b1c2d3e-aaaa-4bbb-8ccc-123456789abc").version == 4
    assert checked(old).findings == 0
    (old / ".nv-meta" / "index.uuid").write_text("0b1c2d3e-aaaa-8bbb-8ccc-123456789abc")
    assert checked(old).lines == (NOT_AS_BUILT,)


def test_the_command_line(data, capsys, monkeypatch):
    def run():
        with pytest.raises(SystemExit) as ended:
            main(["data", "check", str(data)])
        return ended.value.code, capsys.readouterr()

    assert run() == (0, (f"{data}: {NOTHING_WRONG}\n", ""))
    monkeypatch.setattr(damage, "MOST_LISTED", 3)
    for _, _, first, _ in members_of(data / FIRST):
        overwrite(data / FIRST, first, b"?")
    code, said = run()
    listed = said.out.splitlines()
    assert code == 1 and len(listed) == 5 and said.err == ""
    assert listed[3:] == ["... and 5 more", f"{data}: 10 samples in 3 shards: 6 good, 4 damaged"]
    without_checksums(data)
    code, said = run()
    assert (
        code == 1 and "\nnot compared: no checksums of 3 of 3 shards; their records were parsed and images" in said.out
    )


@pytest.mark.slow
def test_any_number_of_workers_finds_the_same(data):
    (data / SECOND).unlink()
    overwrite(data / LAST, 600, b"?")
    assert check_damage(data, workers=2) == checked(data, damaged=5)


def test_a_shard_that_was_finished_before_checksums_is_built_again(tmp_path):
    source = write_jsonl(tmp_path, make_records(tmp_path, 9))
    build_dataset(source, tmp_path / "whole", samples_per_shard=3)
    out, state = tmp_path / "out", tmp_path / ".out.partial" / ".state"
    build_dataset(source, out, samples_per_shard=3, part=Part(1, 2))
    build_dataset(source, out, samples_per_shard=3, part=Part(2, 2))
    (state / "checksums-000001").unlink()
    with pytest.raises(Exception, match=r"finished blocks are \[0, 2\], there must be 3 in a row"):
        join_parts(out)
    build_dataset(source, out, samples_per_shard=3, part=Part(2, 2))
    join_parts(out)
    kept = [(folder / CHECKSUMS_FOLDER / "members.bin").read_bytes() for folder in (out, tmp_path / "whole")]
    assert kept[0] == kept[1] and checked(out).findings == 0
