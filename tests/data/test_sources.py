"""Sources of a build: a folder and a tar of media with captions, WebDatasets; what is missing or cut off is named."""

import io
import json
import re
import tarfile

import pytest
from samples import image_bytes, make_records, question, write_jsonl, write_video

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.index import check_dataset
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.errors import UserError


def write_media(folder):
    """name -> (id, what the model is to say, images, videos) of the good ones, and name -> reason of the bad ones."""
    (folder / "animals").mkdir(parents=True)
    red, blue = image_bytes((30, 20), "red"), image_bytes((20, 30), "blue", "JPEG")
    (folder / "animals" / "cat.png").write_bytes(red)
    (folder / "animals" / "cat.txt").write_text("A red cat.\n")
    (folder / "animals" / "dog.jpg").write_bytes(blue)
    (folder / "animals" / "dog.json").write_text(json.dumps({"caption": "A blue dog.", "licence": "free"}))
    film = write_video(folder / "film.mp4", 10).read_bytes()
    (folder / "film.txt").write_text("It counts to ten.")
    (folder / "two.0.png").write_bytes(red)
    (folder / "two.1.jpg").write_bytes(blue)
    record = question("pair", "<image>Red?<image>Blue?", "Yes.", ["two.1.jpg", "two.0.png"])
    (folder / "two.json").write_text(json.dumps(record))
    (folder / "all.png").write_bytes(red)
    (folder / "all.json").write_text(json.dumps({"conversations": question("", "What?", "Red.")["conversations"]}))
    (folder / "silent.png").write_bytes(red)
    (folder / "words.txt").write_text("words without a picture")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "latin.png").write_bytes(red)
    (folder / "broken.json").write_text("{")
    (folder / "broken.png").write_bytes(red)
    (folder / "list.json").write_text("[]")
    (folder / "readme.md").write_text("neither")
    (folder / "cut.jpg").write_bytes(blue[: len(blue) // 2])
    (folder / "cut.txt").write_text("Cut off.")
    (folder / ".hidden.png").write_bytes(red)
    good = {
        "animals/cat": ("animals/cat", "A red cat.", [red], []),
        "animals/dog": ("animals/dog", "A blue dog.", [blue], []),
        "film": ("film", "It counts to ten.", [], [film]),
        "two": ("pair", "Yes.", [blue, red], []),
        "all": ("all", "Red.", [red], []),
    }
    bad = {
        "silent": "no caption: neither silent.txt nor caption or text in silent.json",
        "words": "neither an image nor a video among words.txt",
        "latin": "latin.txt is not UTF-8 text: .* at byte 3",
        "broken": "broken.json is not JSON",
        "list": "list.json is a JSON list",
        "readme": "neither an image nor a video among readme.md",
        "cut": "image cut.jpg: image cannot be (opened|decoded)",
    }
    return good, bad


def check_built(out, good, bad):
    stored = {sample.conversation.id: sample for sample in iterate_samples(out)}
    assert stored.keys() == {sample_id for sample_id, *_ in good.values()}
    for sample_id, answer, images, videos in good.values():
        sample = stored[sample_id]
        assert sample.conversation.turns[-1].text == answer
        assert list(sample.images) == images and [video.read() for video in sample.videos] == videos
    lines = (out / "rejected.jsonl").read_text().splitlines()
    rejected = {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}
    assert rejected.keys() == bad.keys()
    for key, reason in bad.items():
        assert re.search(reason, rejected[key]), (key, rejected[key])
    return stored


@pytest.mark.slow
def test_a_folder_of_media_with_captions(tmp_path):
    good, bad = write_media(tmp_path / "media")
    report = build_dataset(tmp_path / "media", tmp_path / "out", max_rejected=7, prompt="What is it?", workers=2)
    assert (report.read, report.written, report.rejected) == (12, 5, 7)
    stored = check_built(tmp_path / "out", good, bad)
    assert [turn.text for turn in stored["animals/cat"].conversation.turns] == ["<image>\nWhat is it?", "A red cat."]
    assert stored["film"].conversation.turns[0].text == "<video>\nWhat is it?"
    assert stored["animals/dog"].conversation.extra == {"licence": "free"}


def pack_tar(folder, tar, names=None):
    with tarfile.open(tar, "w") as file:
        for path in names or sorted(path for path in folder.rglob("*") if path.is_file()):
            file.add(path, path.relative_to(folder))
    return tar


def test_a_tar_of_the_same_media(tmp_path):
    good, bad = write_media(tmp_path / "media")
    tar = pack_tar(tmp_path / "media", tmp_path / "media.tar")
    report = build_dataset(tar, tmp_path / "out", max_rejected=7)
    assert (report.read, report.written, report.rejected) == (12, 5, 7)
    check_built(tmp_path / "out", good, bad)


def test_a_folder_of_tars_is_a_webdataset(tmp_path):
    """Keys begin anew in every tar; what an Energon data set of ours holds is read back as it is."""
    good, bad = write_media(tmp_path / "media")
    (tmp_path / "tars").mkdir()
    for number in range(2):
        pack_tar(tmp_path / "media", tmp_path / "tars" / f"{number:03d}.tar")
    report = build_dataset(tmp_path / "tars", tmp_path / "out", max_rejected=15)
    assert (report.read, report.written) == (24, 10)
    # "pair" has an id of its own, so the second one gets its place.
    assert (report.renamed, report.renamed_first) == (1, "pair@001.tar-two")
    ids = {sample.conversation.id for sample in iterate_samples(tmp_path / "out")}
    of_tars = {f"{tar}/{key}" for tar in ("000", "001") for key in good if key != "two"}
    assert ids == of_tars | {"pair", "pair@001.tar-two"}
    records = make_records(tmp_path, 12)
    build_dataset(write_jsonl(tmp_path, records), tmp_path / "first", samples_per_shard=5)
    build_dataset(tmp_path / "first", tmp_path / "second", samples_per_shard=5)
    assert list(iterate_samples(tmp_path / "first")) == list(iterate_samples(tmp_path / "second"))


def test_a_tar_that_is_cut_off_is_counted(tmp_path):
    write_media(tmp_path / "media")
    (tmp_path / "tars").mkdir()
    for name in ("a", "b"):
        pack_tar(
            tmp_path / "media",
            tmp_path / "tars" / f"{name}.tar",
            [tmp_path / "media" / "film.mp4", tmp_path / "media" / "film.txt"],
        )
    data = (tmp_path / "tars" / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "tars" / "a.tar") as tar:
        second = tar.getmembers()[1].offset
    (tmp_path / "tars" / "a.tar").write_bytes(data[: second + 100])
    report = build_dataset(tmp_path / "tars", tmp_path / "out", max_rejected=2)
    assert (report.read, report.written, report.rejected) == (2, 1, 1)
    (entry,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    reason = "a.tar is cut off or damaged after the first file of film: the end mark is missing"
    assert (entry["tar"], entry["reason"]) == ("a.tar", reason)
    assert check_dataset(tmp_path / "out") == 1


def test_media_that_a_record_names_must_be_in_its_tar(tmp_path):
    record = json.dumps(question("x", "<image>?", "!", "/etc/passwd")).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("x.json")
        info.size = len(record)
        tar.addfile(info, io.BytesIO(record))
    with pytest.raises(UserError, match="1 of 1 samples are bad"):
        build_dataset(tmp_path / "a.tar", tmp_path / "out")
    assert "image /etc/passwd is not among the files of its sample" in (tmp_path / "out" / "rejected.jsonl").read_text()
