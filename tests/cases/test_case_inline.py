"""Pictures inside a record: base64, data URIs and bytes are decoded within a limit, all else is refused in short."""

import base64
import json
import os
import random

import pytest
from form_samples import RED, asks, conversation, read, reason
from samples import image_bytes

from megatron_eagle.data.build import shard_writer
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.forms import media
from megatron_eagle.data.storage.shards import iterate_samples

TEXT = base64.b64encode(RED).decode()
WRITTEN = {
    "uri": f"data:image/jpeg;base64,{TEXT}",
    "bare": TEXT,
    "lines": base64.encodebytes(RED).decode(),
    "url-safe": base64.urlsafe_b64encode(RED).decode(),
    "unpadded": TEXT.rstrip("="),
    "object": {"bytes": TEXT},
    "path beside it": {"bytes": TEXT, "path": "a.jpg"},
    "part": {"url": f"data:image/jpeg;base64,{TEXT}"},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_base64_is_decoded(name):
    for record in (asks("?", image=WRITTEN[name]), asks("?", images=[WRITTEN[name]])):
        assert list(read(record).inline.values()) == [RED]
    parts = [{"type": "image_url", "image_url": WRITTEN[name]}, {"type": "text", "text": "?"}]
    made = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]})
    assert list(made.inline.values()) == [RED] and made.conversation.images == tuple(made.inline)


def noise(count):
    return base64.b64encode(random.Random(0).randbytes(count)).decode()


REFUSED = {
    "noise": (noise(300_000), "looks like base64, but its bytes are of no known format"),
    "long name": ("x/" * 300, "looks like base64"),
    "video": (f"data:video/mp4;base64,{noise(90)}", ""),
    "plain uri": ("data:image/svg+xml,<svg/>" + "x" * 500, "is a data: URI without base64"),
    "damaged": ("data:image/png;base64,!!!!" + "x" * 500, "is not base64"),
    "url": ("https://example.org/" + "a" * 500 + ".jpg", "is a URL; only files are read"),
    "file url": ("file:///data/a.jpg", "is a URL; only files are read"),
    "s3": ("s3://bucket/a.jpg", "is a URL"),
    "null": ([None], "neither a path nor a list of paths: None"),
    "nested": ([["a.jpg"]], "neither a path nor a list of paths: ['a.jpg']"),
    "number": (3, "neither a path nor a list of paths: 3"),
    "list of numbers": ({"bytes": [255, 216]}, "has a list as its bytes"),
    "empty object": ({}, "no field"),
    "two paths": ({"path": "a", "url": "b"}, "neither a path"),
    "strange": ({"path": "a", "crop": [0, 0, 1, 1]}, "'image' has 'crop', which is not understood"),
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("video", "empty object")])
def test_what_is_refused_is_shown_in_short(name):
    value, why = REFUSED[name]
    found = reason(asks("<image>?", image=value))
    assert why in found and len(found) < 250


def test_the_bytes_of_a_video_are_refused():
    assert "holds the bytes of a video" in reason(asks("?", video=f"data:video/mp4;base64,{TEXT}"))


def test_the_limit(monkeypatch):
    monkeypatch.setattr(media, "MAX_INLINE", len(RED) + 2)
    assert read(asks("?", image=TEXT)).inline
    monkeypatch.setattr(media, "MAX_INLINE", len(RED) - 3)
    assert f"the limit is {len(RED) - 3}: use a file" in reason(asks("?", image=TEXT))
    assert f"the limit is {len(RED) - 3}: use a file" in reason(asks("?", image={"bytes": RED}))


def test_paths_that_could_be_base64_are_paths():
    for name in ("a" * 80, "data/pictures/" + "b" * 64, "/9j/4AAQ", "sub/" + "Q" * 200):
        assert conversation(asks("?", image=name)).images == (name,)


def test_the_list_of_rejected_samples_stays_small(tmp_path):
    big = noise(300_000)
    records = [asks("<image>?", image=value) | {"id": name} for name, (value, _) in REFUSED.items()]
    records += [
        asks("<image>?", image=big + ".jpg"),
        asks("?", **{big: "x"}),
        asks("?") | {"id": big, "conversations": 3},
        asks("?", **{"image": {big: 1}}),
        asks("?", **{"weird": big}),
        {"id": "turn", "conversations": [{"from": big, "value": "x"}]},
        {"id": "part", "messages": [{"role": "user", "content": [{"type": big}]}]},
        asks("<image>?", image=os.sep.join(["y" * 200] * 30)),
        asks("?", "Yes.", image=f"data:image/png;base64,{base64.b64encode(image_bytes((9, 9), 'red')[:60]).decode()}"),
    ]
    lines = [json.dumps(record) for record in records] + [json.dumps({"id": 10**4000}), big, "[" * 3000]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, json.dumps(asks("?", image=TEXT) | {"id": "good"})]) + "\n")
    build_dataset(tmp_path / "x.jsonl", tmp_path / "out", max_rejected=len(lines))
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(listed) >= len(lines) - 1
    for entry in listed:
        del entry["file"]
        assert all(len(str(value)) <= shard_writer.MOST_LISTED for value in entry.values()), entry
    assert [s.images for s in iterate_samples(tmp_path / "out") if s.conversation.id == "good"] == [(RED,)]


def test_inline_pictures_are_the_same_for_any_way_of_building(tmp_path):
    pictures = [image_bytes((8 + n, 8), "red") for n in range(9)]
    records = [
        asks("?", images=[base64.b64encode(data).decode(), f"data:image/png;base64,{base64.b64encode(data).decode()}"])
        for data in pictures
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for workers in (1, 2):
        build_dataset(tmp_path / "x.jsonl", tmp_path / f"{workers}", samples_per_shard=2, workers=workers)
    first, second = (list(iterate_samples(tmp_path / name)) for name in "12")
    assert first == second and [sample.images for sample in first] == [(data, data) for data in pictures]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "x.jsonl"]


def test_bytes_are_no_other_fields():
    assert "holds 3 bytes" in reason(asks("?", metadata={"raw": b"abc"}))
