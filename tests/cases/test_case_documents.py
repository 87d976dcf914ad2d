"""Documents: pages are the pictures put into the PDF, numbered, cut and degraded as images, or refused by name."""

import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from form_samples import RED, as_bytes, asks, build, conversation, says, texts, write_files, write_tar
from PIL import Image
from samples import make_settings, make_tokenizer, pdf_bytes
from train_cases import answer, train

from megatron_eagle.config.reading import VideoSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.images import decode_image
from megatron_eagle.data.order.lengths import dataset_lengths
from megatron_eagle.data.order.measuring import open_sample_index
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.digest import read_digest
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.data.stream.planned import PlannedStream

TILE, TOKENS_PER_TILE, TAGS = 64, 16, 2
CLOSE = 6.0  # of 255, mean over a page: JPEG in the PDF, and half a pixel of drawing


def picture(number: int, width: int = 250, height: int = 350) -> Image.Image:
    """A page that no other equals: two gradients, upright in one way only."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = across[None, :], down[:, None], 40 * number % 256
    return Image.fromarray(pixels.astype(np.uint8))


def pdf(pages: int, first: int = 1) -> bytes:
    """A document whose page k shows picture k, a dot a pixel when it is drawn."""
    return pdf_bytes([picture(first + number) for number in range(pages)], 150)


def number_of(page: bytes) -> int:
    """Which picture a stored page shows."""
    shown = np.asarray(decode_image(page).resize((250, 350)), dtype=float)
    off = {k: np.abs(shown - np.asarray(picture(k), dtype=float)).mean() for k in range(1, 7)}
    best = min(off, key=off.get)
    assert off[best] < CLOSE, off
    return best


def made(folder: Path, *records: dict, rejected: int = 0, **files: bytes) -> Path:
    write_files(folder, {"a.pdf": pdf(3), "b.pdf": pdf(2, 4), "x.png": as_png(), **files})
    lines = [json.dumps({**record, "id": f"s{n}"}) for n, record in enumerate(records)]
    (folder / "x.jsonl").write_text("\n".join(lines))
    build_dataset(folder / "x.jsonl", folder / "out", max_rejected=rejected)
    return folder / "out"


def as_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


def stored(folder: Path, *records: dict) -> list:
    return list(iterate_samples(made(folder, *records)))


def why(folder: Path, record: dict, **files: bytes) -> str:
    """Why a record is rejected, as rejected.jsonl says."""
    out = made(folder, record, asks("?"), rejected=1, **files)
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    return json.loads(line)["reason"]


def test_pages_are_the_pictures_that_were_put_in(tmp_path):
    (sample,) = stored(tmp_path, asks("<document>What?", document="a.pdf"))
    assert [number_of(page) for page in sample.images] == [1, 2, 3]
    assert [decode_image(page).size for page in sample.images] == [(250, 350)] * 3
    shown = sample.conversation
    assert texts(shown) == ["<image>\n<image>\n<image>What?", "Yes."]
    assert shown.image_documents == (1, 1, 1) and shown.image_numbers == ()


@pytest.mark.parametrize(
    ("pages", "numbers"),
    [("1", [1]), ("2-3", [2, 3]), ("1,3", [1, 3]), ([1, 2], [1, 2]), (3, [3]), (["1", "2-3"], [1, 2, 3])],
)
def test_pages_that_are_asked_for(tmp_path, pages, numbers):
    (sample,) = stored(tmp_path, asks("What?", document={"path": "a.pdf", "pages": pages}))
    assert [number_of(page) for page in sample.images] == numbers


def test_documents_among_images_in_any_order(tmp_path):
    text = "<document-2>second <image>image <document-1>first, again <document-2>"
    record = says(("human", text), ("gpt", "Yes."), documents=["a.pdf", {"path": "b.pdf", "pages": "2"}], image="x.png")
    (sample,) = stored(tmp_path, record)
    # The image is number 1, pages of a.pdf are 2, 3, 4, that of b.pdf is 5.
    assert sample.conversation.numbers("image") == (5, 1, 2, 3, 4, 5)
    assert sample.conversation.image_documents == (1, 0, 2, 2, 2, 3)
    assert [number_of(page) for n, page in enumerate(sample.images) if n != 1] == [5, 1, 2, 3, 5]
    assert sample.images[1] == as_png() and sample.images[0] == sample.images[5]
    wanted = "<image>second <image>image <image>\n<image>\n<image>first, again <image>"
    assert texts(sample.conversation)[0] == wanted


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (asks("What?", document="a.pdf", image="x.png"), "<image>\n<image>\nWhat?"),
        (asks(r"<document>\<document> <document/>", document="a.pdf"), "<image><document> <document/>"),
        (asks(r"<document>\\\<document>", document="a.pdf"), r"<image>\<document>"),
        (asks(r"<document>\<image>", document="a.pdf"), r"<image>\<image>"),
        (asks("<document>a</document>", image="x.png") | {"image": []}, "<document>a</document>"),
        (asks("<document-1>", documents=["a.pdf", "b.pdf"]), "<image>\n<image>"),
    ],
)
def test_where_documents_are_shown(record, text):
    assert texts(conversation(record))[0] == text


def test_a_built_data_set_builds_again(tmp_path):
    records = [asks("<document>", document="a.pdf"), asks("<image><document>", document="b.pdf", image="x.png")]
    out = made(tmp_path, *records)
    build_dataset(out / "shard-000000.tar", tmp_path / "again")
    first, second = list(iterate_samples(out)), list(iterate_samples(tmp_path / "again"))
    assert [s.images for s in first] == [s.images for s in second]
    assert [s.conversation.turns for s in first] == [s.conversation.turns for s in second]
    assert [s.conversation.image_documents for s in second] == [(1, 1, 1), (0, 1, 1)]


def test_documents_of_folders_tars_and_tables(tmp_path, capsys):
    files = {
        "1.pdf": pdf(2),
        "1.txt": "Two pages.",
        "2.dat": pdf(1),
        "2.json": asks("?"),
        "3.png": RED,
        "3.txt": "Red.",
    }
    folder = write_files(tmp_path / "src", files)
    write_tar(tmp_path / "x.tar", [(name, as_bytes(data)) for name, data in files.items()])
    table = {"file_name": "1.pdf", "text": "Two."}
    write_files(tmp_path / "table", {"metadata.jsonl": json.dumps(table), "1.pdf": pdf(2)})
    for source, samples in ((folder, 3), (tmp_path / "x.tar", 3), (tmp_path / "table", 1)):
        printed = build(capsys, source, tmp_path / f"out-{source.name}")
        assert f"{samples} samples read, {samples} written" in printed and "0 left" in printed
        first = next(iterate_samples(tmp_path / f"out-{source.name}"))
        assert [number_of(page) for page in first.images] == [1, 2]


def raw(page: str, trailer: str = "", *more: str, kids: str = "[3 0 R]") -> bytes:
    """A PDF by hand of one page with these entries."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids {kids} /Count {kids.count('R')} >>",
        f"<< /Type /Page /Parent 2 0 R {page} >>",
        *more,
    ]
    body, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(
        f"{place:010d} 00000 n \n" for place in places
    )
    end = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + (table + end).encode()


SMALL = "/MediaBox [0 0 100 50]"
LOCK = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >> /ID [<00> <00>]"
DRAWN = "q 100 0 0 50 0 0 cm /I Do Q"
BOMB = (
    f"<< /Length {len(DRAWN)} >>\nstream\n{DRAWN}\nendstream",
    "<< /Type /XObject /Subtype /Image /Width 60000 /Height 60000 /BitsPerComponent 1 /ColorSpace /DeviceGray "
    "/Length 0 >>\nstream\n\nendstream",
)
HOLDS = f"{SMALL} /Contents 4 0 R /Resources << /XObject << /I 5 0 R >> >>"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%PDF-1.7\n", "document is damaged or has no pages"),
        (pdf(1)[:300], "document is damaged or has no pages"),
        (raw(SMALL, kids="[]"), "document is damaged or has no pages"),
        (RED, "document is JPEG, not PDF"),
        (b"words", "document is of no known format, not PDF"),
        (b"", "document is of no known format, not PDF"),
        (raw(SMALL, LOCK), "document needs a password"),
        (raw("/MediaBox [0 0 1000000 1000000]"), "page 1 of 1e+06x1e+06 points, a side must be from 1 to 14400"),
        (raw("/MediaBox [0 0 14401 10]"), "page 1 of 14401x10 points"),
        (raw("/MediaBox [0 0 0.5 10]"), "page 1 of 0.5x10 points"),
        (raw(HOLDS, "", *BOMB), "page 1 holds a picture of 60000x60000, 3600000000 pixels, the limit is 89478485"),
    ],
)
def test_a_document_that_is_refused(tmp_path, data, reason):
    found = why(tmp_path, asks("?", document="c.pdf"), **{"c.pdf": data})
    assert found.startswith(f"document c.pdf: {reason}") and len(found) <= 200


def test_the_raw_writer_writes_what_is_read(tmp_path):
    (sample,) = iterate_samples(made(tmp_path, asks("?", document="c.pdf"), **{"c.pdf": raw(SMALL)}))
    assert decode_image(sample.images[0]).size == (209, 105)  # 100x50 points at 150 dots an inch, rounded up
    assert Image.open(io.BytesIO(sample.images[0])).mode == "L", "white: no colours are stored"


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ("4", "page 4 of a document of 3 pages"),
        ("1,3-4", "pages 3-4 of a document of 3 pages"),
        ("2-999999", "pages 2-999999 of a document of 3 pages"),
    ],
)
def test_pages_beyond_the_end(tmp_path, pages, reason):
    assert why(tmp_path, asks("?", document={"path": "a.pdf", "pages": pages})) == f"document a.pdf: {reason}"


def test_too_many_pages_and_pixels_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_eagle.data.media.pages.MAX_PAGES", 2)
    assert "3 pages of a document, the limit is 2: say which" in why(tmp_path / "1", asks("?", document="a.pdf"))
    monkeypatch.setattr("megatron_eagle.data.media.pages.MAX_BYTES", 100)
    assert "bytes, the limit is 100" in why(tmp_path / "2", asks("?", document="b.pdf"))
    monkeypatch.undo()
    write_files(tmp_path, {"x.jsonl": asks("?", document="a.pdf"), "a.pdf": pdf(1)})
    (tmp_path / "x.jsonl").write_text(json.dumps(asks("?", document="a.pdf")) + "\n" + json.dumps(asks("?")))
    build_dataset(tmp_path / "x.jsonl", tmp_path / "out", max_rejected=1, max_pixels=50_000)
    assert "pixels, the limit is 50000" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_a_document_under_the_key_of_an_image(tmp_path):
    assert why(tmp_path, asks("?", image="a.pdf")) == "image a.pdf: a PDF, whose key is 'document'"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.pdf", "is PDF, whose key is 'document', not a video"),
        ("x.png", "is PNG, whose key is 'image', not a video"),
        ("y.jpg", "is JPEG, whose key is 'image', not a video"),
        ("z.tar", "is gzip, not a video"),
    ],
)
def test_what_is_no_video_under_the_key_of_one(tmp_path, name, reason):
    """FFmpeg reads all of these but the last as films of a frame or two."""
    files = {"y.jpg": RED, "z.tar": b"\x1f\x8b" + bytes(600)}
    assert why(tmp_path, asks("?", video=name), **files) == f"video {name}: {reason}"


def test_a_missing_document_and_one_outside(tmp_path):
    assert why(tmp_path / "1", asks("?", document="gone.pdf")) == "document gone.pdf is missing"
    assert "lies outside of the media root" in why(tmp_path / "2", asks("?", document="../a.pdf"))


def test_without_pypdfium2_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    reason = why(tmp_path, asks("?", document="a.pdf"))
    assert reason == "document a.pdf: documents are read by pypdfium2: pip install 'megatron-eagle[documents]'"


def test_a_large_page_is_drawn_small_and_a_scan_is_a_jpeg(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    files = {"c.pdf": raw("/MediaBox [0 0 14400 7200]"), "d.pdf": pdf_bytes([noise], 150)}
    large, scan = iterate_samples(made(tmp_path, asks("?", document="c.pdf"), asks("?", document="d.pdf"), **files))
    assert decode_image(large.images[0]).size == (4096, 2048)
    assert scan.images[0][:3] == b"\xff\xd8\xff" and decode_image(scan.images[0]).size == (1200, 900)


def test_inline_documents(tmp_path):
    import base64

    text = base64.b64encode(pdf(2)).decode()
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{text}"}}
    messages = [
        {"role": "user", "content": [part, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Two."},
    ]
    for sample in stored(
        tmp_path, {"messages": messages}, asks("?", document={"bytes": text}), asks("?", document=text)
    ):
        assert [number_of(page) for page in sample.images] == [1, 2]


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_shards(tmp_path):
    out = made(tmp_path, *(asks("?", document="a.pdf") for _ in range(5)))
    build_dataset(tmp_path / "x.jsonl", tmp_path / "two", workers=2, samples_per_shard=1)
    build_dataset(tmp_path / "x.jsonl", tmp_path / "one", workers=1, samples_per_shard=1)
    assert [p.name for p in sorted((tmp_path / "two").glob("*.tar"))] == [f"shard-{n:06d}.tar" for n in range(5)]
    for shard in sorted((tmp_path / "two").glob("*.tar")):
        assert shard.read_bytes() == (tmp_path / "one" / shard.name).read_bytes()
    assert len(list(iterate_samples(out))) == 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, a data set of documents, and one of the same pages as images."""
    folder = tmp_path_factory.mktemp("documents")
    files = {"long.pdf": pdf_bytes([picture(n % 6 + 1) for n in range(24)], 150)}
    records = [
        asks("<document>\nWhat is it?", document="long.pdf"),
        asks("What is it?", documents=["a.pdf", "b.pdf"], image="x.png"),
        says(("human", "<document>"), ("gpt", "It is red."), ("human", "please <image> <document>"), ("gpt", "It is.")),
        asks("<document>", document={"path": "a.pdf", "pages": 2}),
    ]
    records[2] |= {"documents": ["long.pdf", {"path": "b.pdf", "pages": "2"}], "image": "x.png"}
    documents = made(folder / "documents", *records, **files)
    lines = []
    (folder / "images").mkdir()
    for sample in iterate_samples(documents):
        shown = sample.conversation
        names = [f"{shown.id}-{n}.img" for n in range(len(sample.images))]
        for name, data in zip(names, sample.images, strict=True):
            (folder / "images" / name).write_bytes(data)
        record = shown.to_record(names)
        del record["image_documents"]
        lines.append(json.dumps(record))
    (folder / "images" / "x.jsonl").write_text("\n".join(lines))
    build_dataset(folder / "images" / "x.jsonl", folder / "images" / "out")
    return make_tokenizer(folder), documents, folder / "images" / "out"


def settings(path, length, **changes):
    return make_settings(path, pack_length=length, tile_size=TILE, tokens_per_tile=TOKENS_PER_TILE, **changes)


def lengths(path, tokenizer, own):
    return dataset_lengths(open_sample_index(path), tokenizer, own)


@pytest.mark.parametrize(("length", "degrade"), [(8192, False), (8192, True), (2048, True), (1024, True), (900, True)])
def test_where_all_pages_fit_they_cost_what_images_cost(world, length, degrade):
    tokenizer, documents, images = world
    ours, theirs = (lengths(p, tokenizer, settings(p, length, degrade=degrade)) for p in (documents, images))
    assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.tiles.tolist() == theirs.tiles.tolist()
    assert ours.outcomes == theirs.outcomes and not ours.rejected
    planner = VisualPlanner(settings(documents, length, degrade=degrade), tokenizer)
    for one, other in zip(iterate_samples(documents), iterate_samples(images), strict=True):
        (a, plan), (b, _) = tokenise(one, planner), tokenise(other, planner)
        assert all(plan.tiles) and torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        a, b = (add_tiles(x, s, plan, planner.settings) for x, s in ((a, one), (b, other)))
        assert torch.equal(a.tiles, b.tiles) and torch.equal(a.tile_slots, b.tile_slots)


@pytest.mark.parametrize("length", [600, 480, 420, 380])
def test_where_one_tile_a_page_is_too_much_pages_are_left_out(world, length):
    tokenizer, documents, images = world
    own = settings(documents, length, degrade=True)
    found = lengths(documents, tokenizer, own)
    assert found.outcomes["fewer pages"] and not found.rejected
    assert 0 in lengths(images, tokenizer, settings(images, length, degrade=True)).rejected
    planner = VisualPlanner(own, tokenizer)
    for number, sample in enumerate(iterate_samples(documents)):
        segment, plan = tokenise(sample, planner)
        assert (len(segment.tokens), plan.total_tiles) == (found.tokens[number], found.tiles[number])
        assert len(segment.tokens) <= length
        segment = add_tiles(segment, sample, plan, own)
        text = tokenizer.decode(segment.tokens.tolist())
        shown = [place for place, tiles in enumerate(plan.tiles) if tiles]
        numbers = sample.conversation.numbers("image")
        several = len(set(numbers)) > 1
        assert all((f"<image {numbers[place]}>" in text) == several for place in shown)
        assert not any(f"<image {numbers[place]}>" in text for place in set(range(len(numbers))) - set(shown))
        pages = [place for place in shown if sample.conversation.image_documents[place] == 1]
        whole = sum(one == 1 for one in sample.conversation.image_documents)
        assert pages[0] == sample.conversation.image_documents.index(1) and len(pages) >= min(8, whole)
        if len(shown) < len(numbers):  # one page more would not fit, at one tile each
            assert set(plan.tiles) == {0, 1}
            most = TOKENS_PER_TILE + TAGS + len(tokenizer.encode("\n<image 24>"))
            assert len(segment.tokens) + most > length
        gaps = Counter(np.diff(pages).tolist())
        assert max(gaps, default=1) - min(gaps, default=1) <= 1, "spread over the document"


def test_more_room_never_shows_fewer_pages(world):
    tokenizer, documents, _ = world
    sample = next(iterate_samples(documents))
    before = 0
    for length in range(350, 900, 7):
        _, plan = tokenise(sample, VisualPlanner(settings(documents, length, degrade=True), tokenizer))
        shown = sum(tiles > 0 for tiles in plan.tiles)
        assert shown >= before
        before = shown
    assert before == 24


def test_a_document_that_keeps_too_few_pages_is_dropped(world):
    tokenizer, documents, _ = world
    least = settings(documents, 480, degrade=True, video=VideoSettings(least_frames=20))
    found = lengths(documents, tokenizer, least)
    assert set(found.rejected) == {0, 2} and found.outcomes["dropped"] == 2
    found = lengths(documents, tokenizer, settings(documents, 480))
    assert 0 in found.rejected and "a pack holds 480" in found.rejected[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_one_digest_for_any_number_of_ranks_and_workers(world):
    tokenizer, documents, _ = world
    own = settings(documents, 480, degrade=True)

    def digest(ranks, **others):
        opened = lambda rank: PlannedStream(own, tokenizer, rank=rank, world_size=ranks, batch=2, **others)  # noqa: E731
        return read_digest(opened, ranks, 8, 2)

    assert digest(1) == digest(2) == digest(1, workers=2) and digest(1).samples >= 8


def test_documents_and_clips_are_trained_and_asked(small_run, worlds, tmp_path):
    from samples import write_video

    write_video(tmp_path / "film.mp4", 60)
    film = {"path": "film.mp4", "start": 1.0, "end": 4.0}
    context = says(("human", "<document>?"), ("gpt", "No."), ("human", "And?"), ("gpt", "Yes."), document="a.pdf")
    context["conversations"][1]["loss"] = False
    records = [asks("What?", document="a.pdf"), asks("What?", video=film), context, asks("What?", document="b.pdf")]
    data = made(tmp_path, *records)
    changes = small_run.settings()
    stage = {**changes["stages"][0], "steps": 2, "checkpoint_every": 2, "blend": [{"path": str(data)}]}
    recipe = small_run.write_recipe(tmp_path / "r.yaml", stages=[stage], reading={"degrade": True})
    worlds(1).run(train, str(recipe), "first", str(tmp_path / "runs"))
    lines = (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["loss"] > 0 for line in lines)
    worlds(1).run(answer, str(recipe), "first", str(tmp_path / "runs"), str(data), str(tmp_path / "answers"), 4)
    accuracy = json.loads((tmp_path / "answers" / "accuracy.json").read_text())
    assert accuracy["rejected"] == {"s2#1": "answer 1 is context only ('loss' or 'weight' says so)"}
    answers = [json.loads(line) for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(answer["id"] for answer in answers) == ["s0", "s1", "s2#2", "s3"]
