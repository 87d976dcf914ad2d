"""Files that peers publish build as they are: arrays, gzip, Parquet, image folders, tar.gz; damage is named."""

import gzip
import json
import tarfile

import pytest
from form_samples import BLUE, GREEN, RED, asks, build, contents, source_items, texts, write_files, write_tar

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.sources import RecordSource
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.errors import UserError

RECORDS = [asks(f"<image>\nq{n} é 中 [{{", f"a{n}", image="a.jpg") | {"id": str(n)} for n in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
FILES = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "lines.txt": LINES,
    "mark.jsonl": "\ufeff" + LINES,
    "blank.jsonl": "\n\n" + LINES.replace("\n", "\n  \n"),
    "windows.jsonl": LINES.replace("\n", "\r\n"),
    "array.json": json.dumps(RECORDS),
    "array.jsonl": json.dumps(RECORDS, ensure_ascii=False),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "array_lines.json": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "array_mark.json": "\ufeff \n" + json.dumps(RECORDS, indent=1),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_container_holds_the_same_records(tmp_path, name, packed):
    path = tmp_path / (f"{name}.gz" if packed else name)
    data = FILES[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    items, ledger = source_items(path)
    assert [item.content.id for item in items] == ["0", "1", "2", "3", "4"] and not ledger.files
    assert [texts(item.content) for item in items] == [[f"<image>\nq{n} é 中 [{{", f"a{n}"] for n in range(5)]
    size = RecordSource(path).size()
    assert size is None if packed else size == len(data) and sum(item.weight for item in items) > 0.8 * size


def test_gzip_is_told_by_its_content(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(LINES.encode()))
    assert len(source_items(tmp_path / "x.jsonl")[0]) == 5


def test_one_object_over_many_lines(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[0], indent=2))
    (item,) = source_items(tmp_path / "one.json")[0]
    assert item.content.id == "0"


def test_a_long_array_is_read_in_pieces(tmp_path):
    records = [asks("x" * (n * 997 % 200_000), "é" * (n % 7) + "\\" * n + '"') | {"id": str(n)} for n in range(40)]
    (tmp_path / "long.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    items, _ = source_items(tmp_path / "long.json")
    assert [texts(item.content)[0] for item in items] == [r["conversations"][0]["value"].strip() for r in records]


@pytest.mark.parametrize(
    ("text", "good", "why"),
    [
        ('[{"id": 1}', 0, "array, after record 1: not JSON: the array is cut off"),
        (json.dumps(RECORDS)[:-30], 4, "array, after record 4: not JSON"),
        (json.dumps(RECORDS[:2])[:-1] + ", oops]", 2, "array, after record 2: not JSON"),
        (json.dumps(RECORDS[:2])[:-1] + json.dumps(RECORDS[2]) + "]", 2, "expected ',' or ']', found '{'"),
        (json.dumps(RECORDS[:2]) + json.dumps(RECORDS[2]), 2, "text follows the end of the array"),
        ('[1, null, [], "x"]', 0, "record is a JSON int"),
        ("[]", 0, None),
        ("[ ]", 0, None),
    ],
)
def test_a_damaged_array_says_where(tmp_path, text, good, why):
    (tmp_path / "x.json").write_text(text)
    found = contents(source_items(tmp_path / "x.json")[0])
    assert sum(isinstance(one, Conversation) for one in found) == good
    reasons = [one for one in found if isinstance(one, str)]
    assert bool(reasons) == (why is not None) and any(why in one for one in reasons or [""] if why) == bool(why)


def test_a_key_given_twice_is_refused_not_halved(tmp_path):
    twice = '{"id": "1", "image": "a.jpg", "image": "b.jpg", "conversations": []}'
    turn = (
        '{"id": "2", "conversations": [{"from": "human", "value": "a", "value": "b"}, {"from": "gpt", "value": "c"}]}'
    )
    (tmp_path / "x.jsonl").write_text(f"{twice}\n{turn}\n")
    assert contents(source_items(tmp_path / "x.jsonl")[0]) == [
        "key 'image' is given twice",
        "key 'value' is given twice",
    ]
    (tmp_path / "x.json").write_text(f"[{twice}, {turn}, {json.dumps(RECORDS[0])}]")
    found = contents(source_items(tmp_path / "x.json")[0])
    assert found[:2] == ["key 'image' is given twice", "key 'value' is given twice"] and found[2].id == "0"


def test_a_gzip_that_is_cut_off(tmp_path):
    data = gzip.compress((LINES * 2000).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(data[: len(data) // 2])
    items, _ = source_items(tmp_path / "x.jsonl.gz")
    assert items[-1].content.startswith("x.jsonl.gz is cut off or damaged after line") and len(items) > 10
    assert all(isinstance(item.content, Conversation) for item in items[:-1])


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.zip", b"PK\x03\x04rest", "is zip, which is no source"),
        ("x.jsonl.zst", b"(\xb5/\xfdrest", "is zstd, which is no source"),
        ("x.jsonl.xz", b"\xfd7zXZ\0rest", "is xz, which is no source"),
        ("x.csv", b"image,text\na.jpg,red\n", "is a .csv file, which is no source"),
        ("x.parquet", b"no parquet", "is no Parquet file"),
        ("a.png", b"\x89PNG\r\n\x1a\nrest", "is PNG, which is no source"),
        (
            "r.json",
            json.dumps({"a": {"root": "r", "annotation": "a.jsonl"}}, indent=1).encode(),
            "is a recipe of 1 data",
        ),
        ("r.json", b'{"a": {"annotation": "a.jsonl", "repeat_time": 1}}\n', "data build a.jsonl OUT --media-root ."),
    ],
)
def test_what_is_no_source_is_one_line_and_leaves_nothing(tmp_path, name, data, why):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        build_dataset(tmp_path / name, tmp_path / "out")
    assert why in str(caught.value) and [path.name for path in tmp_path.iterdir()] == [name]


def write_table(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


HUGGING_FACE = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"What {n}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A colour."}]},
        ],
        "images": [{"bytes": picture, "path": None}],
        "split": None,
    }
    for n, picture in enumerate([RED, GREEN, BLUE])
]


def test_parquet_with_images_inside(tmp_path):
    build_dataset(write_table(tmp_path / "train.parquet", HUGGING_FACE), tmp_path / "out", samples_per_shard=2)
    stored = list(iterate_samples(tmp_path / "out"))
    assert [sample.images for sample in stored] == [(RED,), (GREEN,), (BLUE,)]
    assert [texts(sample.conversation)[0] for sample in stored] == [f"<image>What {n}?" for n in range(3)]
    assert [sample.conversation.id for sample in stored] == ["row-1", "row-2", "row-3"]


def test_parquet_with_paths_and_with_captions(tmp_path):
    rows = [{"image": {"bytes": None, "path": "a.jpg"}, "conversations": RECORDS[0]["conversations"], "tools": None}]
    (item,) = source_items(write_table(tmp_path / "x.parquet", rows))[0]
    assert item.content.images == ("a.jpg",) and not item.inline
    (item,) = source_items(write_table(tmp_path / "y.parquet", [{"image": {"bytes": RED, "path": "a"}, "text": "A."}]))[
        0
    ]
    assert list(item.inline.values()) == [RED] and texts(item.content)[1] == "A."


def test_a_folder_of_parquet_files(tmp_path):
    for name in ("b", "a"):
        write_files(tmp_path / "tables", {"readme.md": "x"})
        write_table(tmp_path / "tables" / f"{name}.parquet", HUGGING_FACE[:2])
    items, ledger = source_items(tmp_path / "tables")
    assert [item.content.id for item in items] == ["a/row-1", "a/row-2", "b/row-1", "b/row-2"]
    assert ledger.lines() == ["1 stray beside Parquet files (readme.md)"]


def test_a_damaged_parquet_file(tmp_path):
    data = write_table(tmp_path / "x.parquet", HUGGING_FACE).read_bytes()
    (tmp_path / "x.parquet").write_bytes(data[:-100])
    with pytest.raises(UserError, match="x.parquet: no readable Parquet file"):
        build_dataset(tmp_path / "x.parquet", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    (tmp_path / "x.parquet").write_bytes(data[:40] + bytes(60) + data[100:])
    found = contents(source_items(tmp_path / "x.parquet")[0])
    assert any(str(one).startswith("damaged after row") for one in found)


def test_the_image_folder_of_hugging_face(tmp_path):
    lines = [
        {"file_name": "1.jpg", "text": "Red."},
        {"file_name": "sub/2.jpg", "caption": "Green.", "licence": "free"},
        {"file_name": "gone.jpg", "text": "Nothing."},
        {"file_name": "3.jpg", "text": "Blue.", "additional_feature": 1},
    ]
    table = "".join(json.dumps(line) + "\n" for line in lines)
    files = {"metadata.jsonl": table, "1.jpg": RED, "sub/2.jpg": GREEN, "3.jpg": BLUE, "4.jpg": RED}
    folder = write_files(tmp_path / "photos", files)
    report = build_dataset(folder, tmp_path / "out", max_rejected=2, prompt="Which?")
    assert (report.read, report.written, report.rejected) == (4, 2, 2)
    stored = [(s.images[0], texts(s.conversation)) for s in iterate_samples(tmp_path / "out")]
    assert stored == [(RED, ["<image>\nWhich?", "Red."]), (GREEN, ["<image>\nWhich?", "Green."])]
    assert (report.files.used, report.files.rejected, report.files.left) == (3, 1, 1)
    assert report.files.reasons == ("1 not named in metadata.jsonl (4.jpg)",)


def test_tar_gz(tmp_path, capsys):
    members = [("a.jpg", RED), ("a.txt", "Red."), ("b.jpg", GREEN), ("b.json", {"caption": "Green."})]
    write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    write_tar(tmp_path / "plain.tar", members)
    for name in ("x.tar.gz", "plain.tar"):
        assert "files: 4 = 4 used + 0 left" in build(capsys, tmp_path / name, tmp_path / f"out-{name}")
    assert list(iterate_samples(tmp_path / "out-x.tar.gz")) == list(iterate_samples(tmp_path / "out-plain.tar"))
    assert not list(tmp_path.glob(".*"))
    data = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(data[: len(data) * 2 // 3])
    found = contents(source_items(tmp_path / "cut.tgz")[0])
    assert "cut.tgz is cut off or damaged" in found[-1]


def test_a_folder_of_tar_gz_counts_strays(tmp_path):
    folder = write_files(tmp_path / "tars", {"readme.md": "x", "sub/a.txt": "y", ".DS_Store": "z"})
    write_tar(folder / "0.tar", [("a.jpg", RED), ("a.txt", "Red.")])
    write_tar(folder / "1.tar.gz", [("a.jpg", GREEN), ("a.txt", "Green.")], "w:gz")
    items, ledger = source_items(folder)
    assert [item.content.id for item in items] == ["0/a", "1/a"]
    assert ledger.files == 7 and ledger.lines() == ["1 hidden (.DS_Store)", "2 stray beside tar files (readme.md)"]


def test_peers_sample_files_as_they_are(tmp_path):
    """The forms of LLaMA-Factory's mllm_demo.json, v1_multimodal_demo.jsonl, identity.json and ms-swift's test data."""
    turns = [{"content": "<image>Who?", "role": "user"}, {"content": "Two.", "role": "assistant"}]
    parts = [
        {"role": "user", "content": [{"type": "image_url", "value": "d/1.jpg"}, {"type": "text", "value": "Who?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "Two."}]},
    ]
    write_files(
        tmp_path,
        {
            "d/1.jpg": RED,
            "mllm.json": json.dumps([{"messages": turns * 2, "images": ["d/1.jpg", "d/1.jpg"]}] * 3, indent=2),
            "v1.jsonl": json.dumps({"messages": parts}) + "\n",
            "identity.json": json.dumps([{"instruction": "hi", "input": "", "output": "Hello!"}], indent=2),
            "swift.jsonl": '{"query": "EEEEE", "response": "FFFFF", "history": [["AAAAA", "BBBBB"]]}\n',
            "pairs.jsonl": '{"system": "0", "conversation": [{"human": "11111", "assistant": "22222"}]}\n',
        },
    )
    for name, samples, images in (
        ("mllm.json", 3, 2),
        ("v1.jsonl", 1, 1),
        ("identity.json", 1, 0),
        ("swift.jsonl", 1, 0),
    ):
        out = tmp_path / f"out-{name}"
        assert build_dataset(tmp_path / name, out).written == samples
        assert all(len(sample.images) == images for sample in iterate_samples(out))
    assert texts(source_items(tmp_path / "pairs.jsonl")[0][0].content) == ["0", "11111", "22222"]


def test_ids_that_repeat_are_made_unique_by_place(tmp_path, capsys):
    records = [asks("a") | {"id": name} for name in ("x", "x", "y", "x@line-4", "x@line-2", "x")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first, _ = source_items(tmp_path / "x.jsonl")
    ids = [item.content.id for item in first]
    assert ids == ["x", "x@line-2", "y", "x@line-4", "x@line-2@line-5", "x@line-6"]
    assert [item.content.id for item in source_items(tmp_path / "x.jsonl")[0]] == ids
    printed = build(capsys, tmp_path / "x.jsonl", tmp_path / "out", "--samples-per-shard", 2)
    assert "ids: 3 repeat and were made unique by their place, such as 'x@line-2'" in printed


def test_ignored_keys_of_the_command_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(asks("a", strange=1, other=2)) + "\n")
    with pytest.raises(UserError, match="1 of 1 samples are bad"):
        build_dataset(tmp_path / "x.jsonl", tmp_path / "a", ignore_keys=["strange"])
    for number, ignored in enumerate((["strange", "other"], ["all"])):
        build_dataset(tmp_path / "x.jsonl", tmp_path / str(number), ignore_keys=ignored)
        (stored,) = iterate_samples(tmp_path / str(number))
        assert stored.conversation.extra == {"strange": 1, "other": 2}


def test_an_old_tar_without_a_mark_is_one_by_its_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT):
        pass
    (tmp_path / "x.tar").write_bytes(b"\0" * 10240)
    assert source_items(tmp_path / "x.tar")[0] == []
