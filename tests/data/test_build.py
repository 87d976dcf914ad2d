"""Building a data set: what comes out is what went in, every bad line is named, failures leave nothing half done."""

import hashlib
import io
import json
import re
import shutil
import tarfile

import pytest
from PIL import Image
from samples import image_bytes, make_records, question, write_jsonl

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.index import check_dataset
from megatron_eagle.data.storage.shards import dataset_identity, iterate_samples, sample_key, shard_counts
from megatron_eagle.errors import UserError


def rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_what_goes_in_comes_out(tmp_path):
    records = make_records(tmp_path, 23)
    report = build_dataset(write_jsonl(tmp_path, records), tmp_path / "out", samples_per_shard=10)

    assert (report.read, report.written, report.rejected, report.shards) == (23, 23, 0, 3)
    assert shard_counts(tmp_path / "out") == {f"shard-{n:06d}.tar": c for n, c in enumerate([10, 10, 3])}
    assert check_dataset(tmp_path / "out") == 23 and rejected(tmp_path / "out") == []
    stored = list(iterate_samples(tmp_path / "out"))
    assert [sample.conversation.id for sample in stored] == [record["id"] for record in records]
    for sample, record in zip(stored, records, strict=True):
        assert list(sample.images) == [(tmp_path / name).read_bytes() for name in record.get("image", [])]
        assert [turn.text for turn in sample.conversation.turns] == [t["value"] for t in record["conversations"]]
        assert sample.conversation.extra == {"task": "colour"}


def test_images_keep_their_order_beyond_ten(tmp_path):
    names = []
    for number in range(12):
        names.append(f"{number}.png")
        (tmp_path / names[-1]).write_bytes(image_bytes((10 + number, 10), "red"))
    build_dataset(write_jsonl(tmp_path, [question("many", "Compare.", "No.", names)]), tmp_path / "out")
    (sample,) = iterate_samples(tmp_path / "out")
    assert [Image.open(io.BytesIO(data)).width for data in sample.images] == list(range(10, 22))


def tar_digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    records = make_records(tmp_path, 40)
    (tmp_path / records[5]["image"][0]).write_bytes(b"no image")
    jsonl = write_jsonl(tmp_path, [*records, b"no json"])
    for workers in (1, 2):
        report = build_dataset(jsonl, tmp_path / f"w{workers}", max_rejected=2, samples_per_shard=10, workers=workers)
        assert (report.read, report.written, report.rejected) == (41, 39, 2)
    assert tar_digest(tmp_path / "w1") == tar_digest(tmp_path / "w2")
    assert rejected(tmp_path / "w1") == rejected(tmp_path / "w2")


def test_same_input_same_bytes(tmp_path):
    jsonl = write_jsonl(tmp_path, make_records(tmp_path, 8))
    for name in ("a", "b"):
        build_dataset(jsonl, tmp_path / name, samples_per_shard=3)
    assert tar_digest(tmp_path / "a") == tar_digest(tmp_path / "b")
    assert dataset_identity(tmp_path / "a") == dataset_identity(tmp_path / "b")
    build_dataset(write_jsonl(tmp_path, make_records(tmp_path, 7)), tmp_path / "c", samples_per_shard=3)
    assert dataset_identity(tmp_path / "a") != dataset_identity(tmp_path / "c")


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Four good lines, two of one id, among every kind of bad one."""
    folder = tmp_path_factory.mktemp("messy")
    whole = image_bytes((300, 200), "red", "JPEG")
    (folder / "good.jpg").write_bytes(whole)
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "folder.png").mkdir()
    (folder / "zero.png").write_bytes(b"")
    Image.new("1", (9500, 9500)).save(folder / "bomb.png")
    (folder / "thin.png").write_bytes(image_bytes((1, 20_000), "red"))
    (folder.parent / "outside.png").write_bytes(image_bytes((10, 10), "red"))
    lines = [
        question("good", "<image>\nWhat?", "A square.", "good.jpg"),
        b'{"id": "cut off", "conversations": [',
        question("gone", "<image>", "?", "gone.png"),
        question("cut", "<image>", "?", "cut.jpg"),
        question("text", "<image>", "?", "text.png"),
        question("folder", "<image>", "?", "folder.png"),
        question("markers", "<image><image>", "?", "good.jpg"),
        {"id": "empty", "conversations": []},
        question("good", "Again?", "Yes."),
        b'{"id": "latin1", "text": "caf\xe9"}',
        b"   ",
        question("outside", "<image>", "?", "../outside.png"),
        question("absolute", "<image>", "?", str(folder.parent / "outside.png")),
        question("nul", "<image>", "?", "a\0.png"),
        b"[" * 100_000,
        question("also good \u00e9/..", "Text only?", "Yes."),
        question("zero", "<image>", "?", "zero.png"),
        question("bomb", "<image>", "?", "bomb.png"),
        question("thin", "<image>How long?", "Very.", "thin.png"),
        question("", "What?", "That.") | {"id": float("nan")},
        question("inf", "What?", "That.", score=float("inf")),
        question("number", "What?", "That.") | {"conversations": [{"from": "human", "value": float("nan")}]},
        question("half", "<image>", "?", "\ud800.png"),
    ]
    return write_jsonl(folder, lines)


REASONS = {
    2: ("cut off", None, "not JSON"),
    3: ("gone", "gone", "image gone.png is missing"),
    4: ("cut", "cut", "image cut.jpg: image cannot be decoded.*truncated"),
    5: ("text", "text", "image text.png: not an image"),
    6: ("folder", "folder", "image folder.png cannot be read: Is a directory"),
    7: ("markers", "markers", "more <image> markers than images"),
    8: ("empty", "empty", "empty conversation"),
    10: ("latin1", None, "not UTF-8 text: .* at byte 29"),
    12: ("outside", "outside", "outside of the media root"),
    13: ("absolute", "absolute", "outside of the media root"),
    14: ("nul", "nul", "NUL"),
    15: ("deep", None, "not JSON"),
    17: ("zero", "zero", "image zero.png: not an image"),
    18: ("bomb", "bomb", "image of 9500x9500 has 90250000 pixels, the limit is 89478485"),
    20: ("nan", None, "id is neither text nor a whole number: nan"),
    21: ("inf", "inf", "NaN or an infinite number"),
    22: ("number", "number", "turn 1 has a float as its value"),
    23: ("half", "half", r"image path '.ud800.png' is no text that a file's name can be"),
}
GOOD = ["good", "good@line-9", "also good \u00e9/..", "thin"]


def test_every_bad_line_is_listed_and_the_good_ones_kept(messy, tmp_path):
    report = build_dataset(messy, tmp_path / "out", max_rejected=len(REASONS))
    assert (report.read, report.written, report.rejected) == (22, 4, 18)
    entries = rejected(tmp_path / "out")
    assert [entry["line"] for entry in entries] == list(REASONS)
    for entry in entries:
        _, sample_id, reason = REASONS[entry["line"]]
        assert entry["id"] == sample_id and entry["file"] == str(messy)
        assert re.search(reason, entry["reason"]), entry
    assert [s.conversation.id for s in iterate_samples(tmp_path / "out")] == GOOD


def test_too_many_bad_lines_fail_and_leave_only_their_list(messy, tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match=r"18 of 22 samples are bad and 17 are allowed.*rejected\.jsonl") as caught:
        build_dataset(messy, out, max_rejected=17)
    assert "\n" not in str(caught.value)
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"] and len(rejected(out)) == 18
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    build_dataset(messy, out, max_rejected=18)
    assert check_dataset(out) == 4


def test_nothing_usable_is_an_error(tmp_path):
    jsonl = write_jsonl(tmp_path, [b"nonsense"])
    with pytest.raises(UserError, match="no usable sample in 1 lines, 1 rejected"):
        build_dataset(jsonl, tmp_path / "out", max_rejected=5)
    with pytest.raises(UserError, match="no usable sample in 0 lines"):
        build_dataset(write_jsonl(tmp_path, []), tmp_path / "out")


def test_a_finished_data_set_is_never_overwritten(tmp_path):
    jsonl = write_jsonl(tmp_path, make_records(tmp_path, 4))
    build_dataset(jsonl, tmp_path / "out")
    before = tar_digest(tmp_path / "out")
    with pytest.raises(UserError, match="already exists and is not empty"):
        build_dataset(jsonl, tmp_path / "out")
    assert tar_digest(tmp_path / "out") == before


def test_missing_input_and_unwritable_output(tmp_path):
    with pytest.raises(UserError, match=r"cannot build .*out from .*none\.jsonl: No such file"):
        build_dataset(tmp_path / "none.jsonl", tmp_path / "out")
    jsonl = write_jsonl(tmp_path, make_records(tmp_path, 1))
    with pytest.raises(
        UserError, match="cannot build .*samples.jsonl/out from .*samples.jsonl: (File exists|Not a directory)"
    ):
        build_dataset(jsonl, jsonl / "out")
    with pytest.raises(UserError, match="samples.jsonl is not a folder"):
        build_dataset(jsonl, jsonl)
    assert not (tmp_path / "out").exists()


def test_media_root_is_where_paths_start(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(image_bytes((10, 10), "red"))
    (tmp_path / "lists").mkdir()
    jsonl = write_jsonl(tmp_path / "lists", [question("a", "What?", "Red.", "a.png")])
    build_dataset(jsonl, tmp_path / "out", media_root=tmp_path / "media")
    assert check_dataset(tmp_path / "out") == 1


def test_byte_order_mark_and_missing_id(tmp_path):
    record = question("", "Hi", "Hello")
    del record["id"]
    jsonl = write_jsonl(tmp_path, [b"\xef\xbb\xbf" + json.dumps(record).encode(), question("b", "Hi", "Hello")])
    build_dataset(jsonl, tmp_path / "out")
    assert [s.conversation.id for s in iterate_samples(tmp_path / "out")] == ["line-1", "b"]


def test_keys_are_safe_and_unique():
    assert sample_key(3, "../a b.c\u4e2d") == "000000003-_a_b_c_"
    assert sample_key(1, "x" * 500) != sample_key(2, "x" * 500) and len(sample_key(1, "x" * 500)) == 50


def test_check_finds_a_damaged_data_set(tmp_path):
    build_dataset(write_jsonl(tmp_path, make_records(tmp_path, 6)), tmp_path / "out", samples_per_shard=3)
    with pytest.raises(UserError, match="6 samples can be read.* 7 were written"):
        check_dataset(tmp_path / "out", 7)
    with pytest.raises(UserError, match="not a data set made by"):
        check_dataset(tmp_path)
    shutil.copy(tmp_path / "out" / "shard-000000.tar", tmp_path / "copy.tar")
    with tarfile.open(tmp_path / "copy.tar") as tar:
        first = tar.getmembers()[0]
    shard = bytearray((tmp_path / "out" / "shard-000000.tar").read_bytes())
    shard[first.offset_data] = ord("!")
    (tmp_path / "out" / "shard-000000.tar").write_bytes(shard)
    with pytest.raises(UserError, match="not JSON"):
        check_dataset(tmp_path / "out")
    with pytest.raises(UserError, match="sample 000000000-s0 in shard-000000.tar: not JSON"):
        list(iterate_samples(tmp_path / "out"))
