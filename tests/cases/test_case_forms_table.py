"""Every row of the table of forms in docs/data.md is a test: what is said to be read is, what is refused is."""

import base64
import re
from pathlib import Path

import pytest
from form_samples import RED, asks, conversation, read, reason, says, source_items

from megatron_eagle.data.build.containers import parse_json
from megatron_eagle.errors import BrokenSample

DOC = Path(__file__).parents[2] / "docs" / "data.md"
TEXT = base64.b64encode(RED).decode()
PDF = base64.b64encode(b"%PDF-1.7\n" + bytes(60)).decode()
USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
FILM = {"path": "v.mp4", "start": 0, "end": 1}


def with_turn(number, **said):
    record = says(("human", "?"), ("gpt", "One."), ("human", "?"), ("gpt", "Two."))
    record["conversations"][number] |= said
    return record


# Beginning of a row's first cell -> records that are read, records that are refused.
ROWS = {
    "`conversations`": ([asks("?")], []),
    "`messages`": ([{"messages": [USER, ASSISTANT]}], []),
    "`content` as parts": (
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": kind, kind: "a"}, {"type": "text", "text": "?"}]},
                    ASSISTANT,
                ]
            }
            for kind in ("image", "image_url", "video", "video_url")
        ],
        [],
    ),
    "`instruction`": ([{"instruction": "a", "input": "b", "output": "c", "history": []}], []),
    "`query`": ([{"query": "a", "response": "b"}, {"conversation": [{"human": "a", "assistant": "b"}]}], []),
    "`caption` or `text`": ([{"image": "a", "caption": "b"}, {"image": "a", "text": "b"}], [{"text": "b"}]),
    "`image`, `images`": (
        [
            asks("?", **{key: value})
            for key in ("image", "images", "image_list", "video_list")
            for value in ("a", ["a"])
        ],
        [asks("?", image="a", images=["a"])],
    ),
    "`data`": ([asks("?", data=[{"type": "image", "image_list": ["a"]}])], []),
    "a turn's own": ([with_turn(2, **{key: "a"}) for key in ("image", "images", "video", "videos")], []),
    "{`path`}": ([asks("?", image=v) for v in ({"path": "a"}, {"bytes": RED, "path": "a"}, {"url": "a"})], []),
    "base64, `data:`": ([asks("?", image=v) for v in (TEXT, f"data:image/png;base64,{TEXT}", {"bytes": RED})], []),
    "base64 or bytes of a video": (
        [],
        [asks("?", video={"bytes": b"\x1aE\xdf\xa3"}), asks("?", video=f"data:;base64,{TEXT}")],
    ),
    "a URL": ([], [asks("?", image=f"{kind}://x/a.jpg") for kind in ("https", "s3", "file")]),
    "`video`: {`path`": (
        [asks("?", video=v) for v in (FILM, {"video": "v", "start_time": 1, "end_time": 2}, {"path": "v", "start": 3})]
        + [asks("?", video={"path": "v", "video_start": 1.5, "video_end": 2})],
        [asks("?", video=FILM | {"end": 0}), asks("?", video=FILM | {"start": "0"}), asks("?", image=FILM)],
    ),
    "`document`, `documents`": (
        [asks("?", document="a.pdf"), asks("?", documents=["a.pdf", "b.pdf"]), with_turn(2, document="a.pdf")]
        + [
            {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, ASSISTANT]}
            for part in (
                {"type": "document", "document": "a.pdf"},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
                {"type": "input_file", "filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
            )
        ],
        [asks("?", document="a.pdf", documents=["a.pdf"]), asks("?", document=f"data:image/png;base64,{TEXT}")],
    ),
    "{`path`, `pages`}": (
        [asks("?", document={"path": "a.pdf", "pages": pages}) for pages in ("3-7,9", 3, [3, 4], "1", " 2 - 3 , 5")],
        [
            asks("?", document={"path": "a.pdf", "pages": pages})
            for pages in (0, "0-1", "3-2", "4,3", [3, 3], "1-", "-1", "a", True, 1.0, [], "", {}, "9" * 50, [[1]])
        ]
        + [asks("?", image={"path": "a.png", "pages": 1}), asks("?", video={"path": "a.mp4", "pages": 1})],
    ),
    "`<document>`": (
        [
            asks("<document>?", document="a.pdf"),
            asks("<document-2><document-1>", documents=["a.pdf", "b.pdf"]),
            asks("<document>words</document>", image="a.png"),
        ],
        [asks("<document><document>", document="a.pdf"), asks("<document-2>", document="a.pdf")],
    ),
    "{`lmdb_file`": ([], [asks("?", image={"lmdb_file": "f", "lmdb_key": "k"})]),
    "`<image>`, `<video>`": ([asks("<image><video>", image="a", video="b"), asks("?", image="a", video="b")], []),
    "`<image-2>`": ([asks("<image-2><image-2><video-1>", image=["a", "b"], video="c")], []),
    "`<image>` and": ([], [asks("<image><image-1>", image=["a", "b"])]),
    "`<image1>`": (
        [asks("<image1>")],
        [
            asks(mark, image="a")
            for mark in ("<image1>", "<Image>", "<ImageHere>", "<image_placeholder>", "<img>", "[IMG]")
        ]
        + [asks("<|vision_start|>", image="a")],
    ),
    "`\\<image>`": ([asks(r"<image>\<image>", r"\\\<image>", image="a")], []),
    "`system`": ([asks("?", system="s")], []),
    "`tools`": ([], [asks("?", tools="[{}]"), asks("?", functions=[{}])]),
    "`loss`": (
        [with_turn(1, loss=False), with_turn(1, weight=0), with_turn(1, loss_weight=1.0)],
        [with_turn(1, weight=0.5)],
    ),
    "an answer without": ([], [asks("?", "\u200b "), says(("human", "?"))]),
    "`audio`": ([], [asks("?", **{key: ["x"]}) for key in ("audio", "chosen", "rejected")]),
    "about the sample": ([asks("?", task="a", source="b", license="c")], [asks("?", metadata={"image": "a.png"})]),
    "any other key": ([], [asks("?", strange=1)]),
}
ELSEWHERE = ("`id` that repeats", "a key given twice")


def rows():
    table = DOC.read_text(encoding="utf-8").split("## Forms of a record")[1].split("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line) for line in table.splitlines() if line.startswith("|")]
    return {cells[1].strip(): cells[2].strip() for cells in lines[2:]}


def test_the_table_and_the_tests_have_the_same_rows():
    starts = (*ROWS, *ELSEWHERE)
    matched = [max((start for start in starts if row.startswith(start)), key=len, default=row) for row in rows()]
    assert sorted(matched) == sorted(starts)


@pytest.mark.parametrize("start", ROWS)
def test_a_row(start):
    own = {row: verdict for row, verdict in rows().items() if row.startswith(start)}
    verdict = own[min(own, key=len)]
    good, bad = ROWS[start]
    assert bool(good) == (not verdict.startswith("refused") or "beside" in verdict) and (good or bad)
    for record in good:
        assert conversation(record).turns
    for record in bad:
        assert reason(record)


def test_ids_and_keys_given_twice(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": 1, "query": "a", "response": "b"}\n' * 2)
    assert [item.content.id for item in source_items(tmp_path / "x.jsonl")[0]] == ["1", "1@line-2"]
    with pytest.raises(BrokenSample, match="given twice"):
        parse_json(b'{"a": 1, "a": 2}', "line")


def test_ignored_keys():
    assert read(asks("?", strange=1), ("strange",)) and read(asks("?", strange=1), ("all",))
