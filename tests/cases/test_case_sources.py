"""A source is read whole or says what it left: dotted names, unknown contents, links, repeated names, two captions."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from form_samples import (
    BLUE,
    GREEN,
    RED,
    asks,
    build,
    contents,
    link,
    says,
    source_items,
    texts,
    write_files,
    write_tar,
)
from PIL import Image
from samples import image_bytes, write_video

from megatron_eagle.data.build.dataset import Part, build_dataset, join_parts
from megatron_eagle.data.build.groups import FoundFile, group_files
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.sniff import sniff
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.storage.shards import iterate_samples


def grouped(*names):
    files = [FoundFile(name, FileSlice.whole(Path(__file__))) for name in names]
    return {group.key: sorted(group.names) for group in group_files(files)}


def test_names_with_dots_of_their_own():
    assert grouped("page 1.0.jpg", "page 1.0.txt", "page 1.5.jpg", "page 1.5.txt") == {
        "page 1.0": ["page 1.0.jpg", "page 1.0.txt"],
        "page 1.5": ["page 1.5.jpg", "page 1.5.txt"],
    }
    shots = [f"a/Screenshot_2024-01-02_10.{n}.{ending}" for n in ("15.22", "40.01") for ending in ("jpg", "txt")]
    assert list(grouped(*shots)) == ["a/Screenshot_2024-01-02_10.15.22", "a/Screenshot_2024-01-02_10.40.01"]
    versions = [f"v1.{n}.{m}.{ending}" for n in range(3) for m in range(3) for ending in ("png", "json")]
    assert len(grouped(*versions)) == 9


def test_a_webdataset_stays_one():
    """What the first dot says stands where no other reading is possible."""
    assert grouped("7.json", "7.0.png", "7.1.jpg", "7.v0.mp4") == {"7": ["7.0.png", "7.1.jpg", "7.json", "7.v0.mp4"]}
    assert grouped("000.image.jpg", "000.caption.txt", "000.meta.json").keys() == {"000"}
    assert grouped("000.jpg", "000.caption.txt").keys() == {"000"}
    assert grouped("a.b.c.jpg", "a.b.c.txt").keys() == {"a"}
    assert grouped("1.left.png", "1.right.png", "1.txt", "2.left.png", "2.txt").keys() == {"1", "2"}


def test_a_medium_without_a_text_joins_the_nearest_name_that_has_one():
    assert grouped("a.1.jpg", "a.1.txt", "a.1.x.jpg", "a.2.jpg", "a.txt") == {
        "a.1": ["a.1.jpg", "a.1.txt", "a.1.x.jpg"],
        "a": ["a.2.jpg", "a.txt"],
    }


def test_two_readings_are_no_guess():
    """22.06.jpg has no caption; the one of 22.05 is not its own."""
    groups = grouped("22.05.jpg", "22.05.txt", "22.06.jpg")
    assert groups == {"22.05": ["22.05.jpg", "22.05.txt"], "22.06": ["22.06.jpg"]}


@pytest.mark.parametrize("as_tar", [False, True])
def test_dotted_names_build(tmp_path, as_tar):
    files = {
        "22.05.jpg": RED,
        "22.05.txt": "Red.",
        "22.06.jpg": GREEN,
        "22.06.txt": "Green.",
        "1.jpg": BLUE,
        "1.txt": "B.",
    }
    source = write_files(tmp_path / "src", files)
    if as_tar:
        source = write_tar(tmp_path / "x.tar", list(files.items()))
    build_dataset(source, tmp_path / "out")
    found = {s.conversation.id: (s.images, texts(s.conversation)[1]) for s in iterate_samples(tmp_path / "out")}
    assert found == {"22.05": ((RED,), "Red."), "22.06": ((GREEN,), "Green."), "1": ((BLUE,), "B.")}


def picture(format, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("name", ["one.jfif", "one.jpe", "one.dat", "one.JPG", "one.avif", "one.mp4"])
def test_the_content_says_what_a_picture_is(tmp_path, format, name):
    folder = write_files(tmp_path / "src", {name: picture(format), "one.json": asks("What?")})
    (item,) = source_items(folder)[0]
    assert item.content.images == (name,) and item.files == 2


@pytest.mark.parametrize("name", ["one.jpg", "one.film", "one.MP4"])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts", "mov"])
def test_the_content_says_what_a_video_is(tmp_path, name, ending):
    film = write_video(tmp_path / f"film.{ending}", 5).read_bytes()
    (item,) = source_items(write_files(tmp_path / "src", {name: film, "one.txt": "It counts."}))[0]
    assert item.content.videos == (name,) and item.content.images == ()


def iso(brand, *others):
    body = brand + b"\0\0\0\0" + b"".join(others)
    return (8 + len(body)).to_bytes(4, "big") + b"ftyp" + body + b"\0" * 64


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("two.heic", iso(b"heic", b"mif1"), "two.heic is HEIF, which is not decoded"),
        ("two.avif", iso(b"avif", b"mif1"), "two.avif is AVIF, which is not decoded"),
        ("two.jpg", iso(b"mif1", b"avif"), "two.jpg is AVIF, which is not decoded"),
        ("two.psd", b"8BPS\0\1", "two.psd is Photoshop, which is not decoded"),
        ("two.npy", b"\x93NUMPY\x01\0", "two.npy is NumPy, which is not decoded"),
        ("two.xyz", b"who knows", "two.xyz is neither an image nor a video"),
        ("two.cls", b"3", "two.cls is neither an image nor a video"),
        ("two.wav", b"RIFF\0\0\0\0WAVE", "two.wav is RIFF, which is not decoded"),
    ],
)
@pytest.mark.parametrize(
    "text", [{"two.json": asks("What?")}, {"two.txt": "Two."}, {"two.txt": "Two.", "two.png": RED}]
)
def test_an_unknown_file_of_a_group_is_a_rejection_that_names_it(tmp_path, name, data, why, text):
    folder = write_files(tmp_path / "src", {name: data, **text})
    (found,) = contents(source_items(folder)[0])
    assert found == why
    (found,) = contents(source_items(write_tar(tmp_path / "x.tar", [(name, data), *text.items()]))[0])
    assert found == why


def test_sniffing_needs_more_than_two_letters():
    for head in (b"BM is short for benchmark", b"P5", b"G" * 500, b"", b"\0" * 600, b"{}"):
        assert sniff(head).kind in (None, "video" if head == b"G" * 500 else None)


def test_links_in_a_tar_are_what_they_point_to(tmp_path):
    members = [
        ("1.jpg", RED), ("1.txt", "Red."), link("2.jpg", "1.jpg"), ("2.json", asks("What?")),
        link("d/3.jpg", "../1.jpg", tarfile.SYMTYPE), ("d/3.txt", "Red again."),
        link("4.jpg", "/etc/passwd", tarfile.SYMTYPE), ("4.txt", "No."), link("5.jpg", "6.jpg", tarfile.SYMTYPE),
        link("6.jpg", "5.jpg", tarfile.SYMTYPE), ("5.txt", "Round."), ("6.txt", "Round."),
    ]  # fmt: skip
    report = build_dataset(write_tar(tmp_path / "x.tar", members), tmp_path / "out", max_rejected=3)
    stored = {sample.conversation.id: sample.images for sample in iterate_samples(tmp_path / "out")}
    assert stored == {"1": (RED,), "x": (RED,), "d/3": (RED,)}
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "4.jpg is a link to /etc/passwd, which is not in it" in rejected and "5.jpg is a link" in rejected
    assert (report.files.used, report.files.rejected, report.files.left) == (6, 6, 0)


@pytest.mark.parametrize("as_tar", [False, True])
def test_a_short_name_is_not_taken_for_another_files(tmp_path, as_tar):
    """0.0.png is "0.png" after its key, and 0.png is there, too."""
    files = {"0.png": image_bytes((4, 4), "red"), "0.0.png": image_bytes((8, 4), "blue"), "0.txt": "Both."}
    source = write_tar(tmp_path / "x.tar", list(files.items())) if as_tar else write_files(tmp_path / "src", files)
    build_dataset(source, tmp_path / "out")
    (sample,) = iterate_samples(tmp_path / "out")
    assert sorted(sample.images) == sorted([files["0.png"], files["0.0.png"]])


def test_names_that_repeat_in_a_tar_are_refused(tmp_path):
    members = [
        ("1.jpg", RED),
        ("1.txt", "Red."),
        ("2.jpg", RED),
        ("2.txt", "R."),
        ("1.jpg", GREEN),
        ("1.txt", "Green."),
    ]
    items, ledger = source_items(write_tar(tmp_path / "x.tar", members))
    assert contents(items)[0] == "1.jpg stands 2 times in it; 1.txt stands 2 times in it"
    assert isinstance(contents(items)[1], Conversation)
    assert ledger.files == 6 and ledger.lines() == ["2 repeated name (1.jpg)"]


def test_files_of_a_sample_need_not_lie_next_to_each_other(tmp_path):
    members = [("1.json", asks("What?")), ("2.jpg", GREEN), ("2.txt", "Green."), ("1.jpg", RED)]
    found = contents(source_items(write_tar(tmp_path / "x.tar", members))[0])
    assert [one.images for one in found] == [("1.jpg",), ("2.jpg",)]


def test_what_is_no_file_in_a_tar_is_counted(tmp_path):
    fifo, folder = tarfile.TarInfo("pipe"), tarfile.TarInfo("d")
    fifo.type, folder.type = tarfile.FIFOTYPE, tarfile.DIRTYPE
    members = [("1.jpg", RED), ("1.txt", "Red."), ("pipe", fifo), ("d", folder), ("._1.jpg", b"x")]
    items, ledger = source_items(write_tar(tmp_path / "x.tar", members))
    assert len(items) == 1 and ledger.files == 4
    assert ledger.lines() == ["1 hidden (._1.jpg)", "1 not a regular file (pipe)"]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a.jpg": RED, "a.txt": "One.", "a.json": {"caption": "Two."}}, "two captions: a.txt and a.json differ"),
        ({"a.jpg": RED, "a.json": {"caption": "One.", "text": "Two."}}, "two captions: caption and text differ"),
        ({"a.jpg": RED, "a.txt": "One.", "a.json": asks("What?")}, "a.txt beside a record with turns"),
        ({"a.jpg": RED, "a.txt": "One.", "a.TXT": "Two."}, "several texts: a.TXT, a.txt"),
        ({"a.jpg": RED, "a.json": {"caption": "One.", "strange": 1}}, "key 'strange' is not understood"),
        ({"a.jpg": RED, "a.txt": "One.", "a.json": {"image": "a.jpg", "images": ["a.jpg"]}}, "under several keys"),
    ],
)
def test_two_captions_are_refused(tmp_path, files, why):
    (found,) = contents(source_items(write_files(tmp_path / "src", files))[0])
    assert why in found


def test_the_same_caption_twice_is_one(tmp_path):
    files = {"a.jpg": RED, "a.txt": "One.\n", "a.json": {"caption": "One.", "width": 3}}
    (found,) = contents(source_items(write_files(tmp_path / "src", files))[0])
    assert texts(found)[1] == "One." and found.extra == {"width": 3}


def test_every_file_of_a_folder_is_used_or_left(tmp_path, capsys):
    folder = write_files(
        tmp_path / "src",
        {
            "a.jpg": RED, "a.txt": "Red.", "b.jpg": RED, "b.json": asks("What?", image="b.jpg"), "b.2.jpg": GREEN,
            ".hidden": "x", "c.jpg": BLUE, "readme.md": "x",
            "sub/d.png": image_bytes((4, 4), "red"), "sub/d.txt": "Red.",
            "ann/e.json": says(("human", "<image>"), ("gpt", "Red."), image="pictures/e.jpg"), "pictures/e.jpg": RED,
        },
    )  # fmt: skip
    os.symlink("nowhere", folder / "broken.jpg")
    os.symlink(tmp_path, folder / "linked")
    os.symlink("a.jpg", folder / "f.jpg")
    (folder / "f.txt").write_text("Red, too.")
    printed = build(capsys, folder, tmp_path / "out", "--max-rejected", 2)
    assert "7 samples read, 5 written, 2 rejected" in printed
    assert (
        "files: 16 = 10 used + 2 in rejected samples + 4 left: 1 hidden (.hidden), 1 link that leads nowhere "
        "(broken.jpg), 1 link to a folder (linked), 1 not named by its record (b.2.jpg)\n" in printed
    )
    stored = {sample.conversation.id: sample.images for sample in iterate_samples(tmp_path / "out")}
    assert stored["x"] == (RED,) and stored["f"] == (RED,) and len(stored) == 5


def test_parts_count_the_same_files(tmp_path):
    members = [(f"{n}.{e}", RED if e == "jpg" else f"{n}") for n in range(7) for e in ("jpg", "txt")]
    tar = write_tar(tmp_path / "x.tar", [*members, ("stray", "x")])
    whole = build_dataset(tar, tmp_path / "whole", samples_per_shard=2, max_rejected=1)
    for number in (2, 1):
        build_dataset(tar, tmp_path / "parts", samples_per_shard=2, part=Part(number, 2))
    joined = join_parts(tmp_path / "parts", max_rejected=1)
    assert joined == whole and whole.files.total == 15 and whole.files.rejected == 1


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "src", {"a.jpg": RED, "a.txt": "Red.", "sub/b.jpg": RED, "sub/b.txt": "Red."})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        source_items(folder)


def test_any_order_of_a_tar_gives_the_same_samples(tmp_path):
    files = [
        (f"{n}.{m}.{e}", RED if e == "jpg" else f"{n}.{m}") for n in range(3) for m in range(3) for e in ("jpg", "txt")
    ]
    wanted = {(f"{n}.{m}", f"{n}.{m}") for n in range(3) for m in range(3)}
    for seed in range(5):
        random.Random(seed).shuffle(files)
        items, _ = source_items(write_tar(tmp_path / f"{seed}.tar", files))
        assert {(item.content.id, texts(item.content)[1]) for item in items} == wanted
