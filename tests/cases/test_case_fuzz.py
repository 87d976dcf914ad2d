"""Thousands of records and sources, turned about: whatever is stored shows all that was there, the rest is counted.

What a record holds is counted here by names that are in nothing else (``m7.png``, ``w7w``), wherever they stand. The
counting knows no form and no key, so it cannot share a mistake with the reader.
"""

import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from form_samples import link, source_items, write_files, write_tar
from PIL import Image
from samples import image_bytes, pdf_bytes, write_video

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.sources import RecordSource, locate
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.pages import read_pages
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.errors import BrokenSample

FAST_RECORDS, FAST_SOURCES = 240, 60
RECORDS, SOURCES, BATCH = 15_000, 5_000, 1_000
PICTURES, FILMS = [f"m{n}.png" for n in range(6)], [f"f{n}.mp4" for n in range(2)]
DOCUMENTS, START = [f"d{n}.pdf" for n in range(2)], 0.1  # of two pages; of a clip
NAME, WORD = re.compile(r"\b[mfd]\d+\.(?:png|mp4|pdf)\b"), re.compile(r"\bw\d+w\b")
KEYS = [
    "image", "images", "image_list", "Image", "image_path", "pictures", "video", "videos", "video_list", "data",
    "media", "conversations", "messages", "conversation", "turns", "from", "role", "value", "content", "text",
    "caption", "system", "tools", "query", "response", "instruction", "output", "history", "loss", "weight", "type",
    "path", "url", "bytes", "file_name", "human", "assistant", "extra", "data_", "document", "image_numbers",
    "documents", "pages", "start", "end", "image_documents",
]  # fmt: skip
ABOUT = ["source", "note", "metadata", "task"]  # keys that say something about a sample
MARKS = ["<image>", "<video>", "<image-1>", "<image-2>", "<video-1>", "\\<image>", "\\<video>", "\\<image-1>", ""]
MARKS += ["<document>", "<document-1>", "\\<document>"]
LOOKALIKES = ["<image1>", "<Image>", "<ImageHere>", "<|vision_start|>", "<image_placeholder>", "<image 1>"]


def make_record(rng):
    """A record of some form with pictures, films and words of its own, mostly good."""
    words = iter(rng.sample(range(1000), 12))
    images, films = rng.sample(PICTURES, rng.randint(0, 3)), rng.sample(FILMS, rng.choice([0, 0, 1]))
    documents = rng.sample(DOCUMENTS, rng.choice([0, 0, 0, 1, 2]))
    marks = ["<image>"] * len(images) + ["<video>"] * len(films) + ["<document>"] * len(documents)
    match rng.randrange(4):
        case 0:
            marks = []
        case 1:
            marks = [f"<image-{n + 1}>" for n in range(len(images))] + [f"<video-{n + 1}>" for n in range(len(films))]
            marks += [f"<document-{n + 1}>" for n in range(len(documents))]
            rng.shuffle(marks)
    texts = [f"{''.join(marks)} w{next(words)}w?", f"w{next(words)}w.", f"w{next(words)}w?", f"w{next(words)}w."]
    clips = [{"path": name, "start": START} if rng.random() < 0.3 else name for name in films]
    media = {rng.choice(["image", "images", "image_list"]): images, rng.choice(["video", "videos"]): clips}
    if documents:
        media[rng.choice(["document", "documents"])] = documents
    roles = ["human", "gpt", "human", "gpt"]
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=True)]
    record = {"conversations": turns, **media}
    match rng.randrange(6):
        case 0:
            names = {"human": "user", "gpt": "assistant"}
            messages = [{"role": names[turn["from"]], "content": turn["value"]} for turn in turns]
            if rng.random() < 0.5:
                parts = [{"type": "image_url", "image_url": {"url": name}} for name in images]
                parts += [{"type": "video", "video": name} for name in films]
                parts += [{"type": "document", "document": {"path": name, "pages": "1-2"}} for name in documents]
                messages[0]["content"] = [*parts, {"type": "text", "text": f"w{next(words)}w?"}]
                media = {}
            record = {"messages": messages, **media}
        case 1:
            lists = [{"type": "image", "image_list": images}, {"type": "video", "video_list": clips}]
            record = {"conversations": turns, "data": lists, "documents": documents}
        case 2:
            record = {"query": texts[0], "response": texts[1], "history": [], "images": images, "videos": clips}
            record["document"] = documents
        case 3:
            turns[0] |= {"value": f"w{next(words)}w?", "image": images, "document": documents}
            record = {"conversations": turns, "videos": films}
    if rng.random() < 0.3:
        record["system"] = f"w{next(words)}w!"
    if rng.random() < 0.3:
        record[rng.choice(ABOUT)] = rng.choice(["x", 3, {"a": ["b"]}, *images])
    return record


def places(value, path=()):
    """Every (container, key) of a record."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(pairs):
        yield value, key
        yield from places(part, (*path, key))


def mutate(rng, record):
    """One to three changes: keys renamed, moved, copied, nested, removed; values doubled; marks set and permuted."""
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        found = list(places(record))
        if not found:
            break
        where, key = rng.choice(found)
        containers = [record, *(w[k] for w, k in places(record) if isinstance(w[k], dict))]
        match rng.randrange(8):
            case 0 if isinstance(where, dict):
                about = NAME.search(json.dumps(where[key])) and rng.random() < 0.2
                where[rng.choice(ABOUT if about else KEYS)] = where.pop(key)
            case 1 if isinstance(where, dict):
                rng.choice(containers)[rng.choice([key, *KEYS])] = where.pop(key)
            case 2 if isinstance(where, dict):
                rng.choice(containers).setdefault(rng.choice([key, *KEYS]), json.loads(json.dumps(where[key])))
            case 3:
                where[key] = rng.choice([[where[key]], {rng.choice(KEYS): where[key]}, {key: where[key]}])
            case 4 if isinstance(where[key], list) and where[key]:
                where[key].insert(rng.randrange(len(where[key]) + 1), json.loads(json.dumps(rng.choice(where[key]))))
            case 5 if isinstance(where[key], list):
                rng.shuffle(where[key])
            case 6 if isinstance(where[key], str) and not NAME.search(where[key]):
                where[key] = f" {rng.choice([*MARKS, *LOOKALIKES])} ".join([rng.choice(MARKS), where[key]])
            case 7 if isinstance(where, dict):
                strange = [f"w{rng.randrange(1000)}w", rng.choice(PICTURES), None, 1, 0, [], ""]
                where[rng.choice(KEYS)] = rng.choice(strange)
    return record


def strings(value, about=False):
    """Every text of a record with whether it stands in a key about the sample."""
    if isinstance(value, str):
        yield value, about
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from strings(part, about or key in ABOUT)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part, about)


def starts(value):
    """How often the start of a clip is in a record, beside keys about the sample."""
    if isinstance(value, dict):
        return sum(starts(part) for key, part in value.items() if key not in ABOUT)
    return sum(map(starts, value)) if isinstance(value, list) else value == START


def held(record):
    """(how often each medium, how often each word) is in a record.

    Of what stands in keys about the sample, words are not of its turns, and a medium may only be named again.
    """
    media, named, words = Counter(), Counter(), Counter()
    for text, about in strings(record):
        words.update(WORD.findall(text) if not about else ())
        (named if about else media).update(NAME.findall(text))
    return media | Counter(dict.fromkeys(named, 1)), words


def check_sample(record, conversation, media):
    """A stored sample shows every medium and every word of its record, and no lookalike beside media."""
    had, words = held(record)
    shown = Counter(media)
    text = "\n".join(turn.text for turn in conversation.turns)
    said = Counter(WORD.findall(text))
    assert all(shown[name] == shown[f"{name} page 2"] for name in DOCUMENTS), record
    assert not starts(record) or any(conversation.video_clips), (record, conversation)
    shown.update(NAME.findall(text))  # a name that has become somebody's words is read as them
    # A medium without any own place in the turns may be shown more often than it is listed: <image-1> twice.
    assert all(shown[name] >= count for name, count in had.items()), (record, conversation)
    assert all(said[word] >= count for word, count in words.items()), (record, conversation)
    assert not media or not any(re.search(rf"(?<!\\){re.escape(mark)}", text) for mark in LOOKALIKES), record


def records_add_up(folder, count, seed):
    """Through the real build, with the bytes of every stored medium told apart."""
    rng = random.Random(seed)
    names = {}
    for number, name in enumerate(PICTURES):
        (folder / name).write_bytes(image_bytes((8 + number, 8), "red"))
    for number, name in enumerate(FILMS):
        write_video(folder / name, 3 + number)
    for name in [*PICTURES, *FILMS]:
        names[(folder / name).read_bytes()] = name
    for name in DOCUMENTS:
        pages = [Image.new("RGB", (20, 20 + int(name[1])), colour) for colour in ("red", "blue")]
        (folder / name).write_bytes(pdf_bytes(pages))
        first, second = read_pages(FileSlice.whole(folder / name), ())
        names |= {first: name, second: f"{name} page 2"}
    records = {f"r{n}": mutate(rng, make_record(rng)) for n in range(count)}
    lines = [json.dumps({**record, "id": identity}) for identity, record in records.items()]
    (folder / "x.jsonl").write_text("\n".join(lines) + "\n")
    report = build_dataset(folder / "x.jsonl", folder / "out", max_rejected=count)
    listed = (folder / "out" / "rejected.jsonl").read_text().splitlines()
    assert report.read == count == report.written + len(listed) and len(listed) == report.rejected
    stored = 0
    for sample in iterate_samples(folder / "out"):
        media = [names[data] for data in sample.images] + [
            names[video if isinstance(video, bytes) else video.read()] for video in sample.videos
        ]
        check_sample(records[sample.conversation.id], sample.conversation, media)
        stored += 1
    assert stored == report.written
    assert count // 10 < report.written < count * 9 // 10


def make_files(rng):
    """Names and contents of a source: stems with dots, texts of several kinds, unknown files, links."""
    files = {}
    for number in range(rng.randint(1, 5)):
        stem = rng.choice([str(number), f"{number}.{rng.randrange(3)}", f"p {number // 2}.{number}", f"d/{number}"])
        word = f"w{rng.randrange(10**6)}w"
        for part in range(rng.choice([1, 1, 1, 2])):
            inner = rng.choice(["", f".{part}"])
            name = f"{stem}{inner}.{rng.choice(['png', 'png', 'jfif', 'dat', 'mp4', 'PNG'])}"
            files[name] = rng.choice([PICTURE, PICTURE, PICTURE, b"unknown"])
        turns = [{"from": "human", "value": rng.choice(["", "<image>"]) + "q"}, {"from": "gpt", "value": word}]
        named = {"image": rng.sample(list(files), rng.randint(1, min(2, len(files))))} if rng.random() < 0.3 else {}
        texts = {
            "txt": word,
            "json": json.dumps(rng.choice([{"caption": word}, {"conversations": turns, **named}, {"strange": word}])),
        }
        for ending in rng.choice([["txt"], ["txt"], ["json"], ["json"], ["txt", "json"], []]):
            files[f"{stem}.{ending}"] = texts[ending].replace(word, f"w{rng.randrange(10**6)}w")
    if rng.random() < 0.2:
        files[rng.choice([".hidden", "readme.md", "d/._x.png"])] = b"stray"
    return files


PICTURE = image_bytes((8, 8), "red")


def write_source(rng, folder: Path):
    """A folder or a tar of random files, and the number of files in it."""
    files = make_files(rng)
    if rng.random() < 0.5:
        source = write_files(folder / "src", files)
        count = len(files)
        if rng.random() < 0.2:
            target, name = rng.choice([*files, "nowhere"]), f"{rng.choice(list(files))}.link.png"
            (source / name).symlink_to(source / target)
            count += 1
        return source, count
    members = list(files.items())
    rng.shuffle(members)
    if rng.random() < 0.3:
        members.append(rng.choice(members))
    if rng.random() < 0.3:
        name = f"{rng.choice(list(files)).rpartition('.')[0]}.l.png"
        members.append(link(name, rng.choice([*files, "nowhere"]), rng.choice([tarfile.LNKTYPE, tarfile.SYMTYPE])))
    return write_tar(folder / "x.tar", members), len(members)


def all_found(item):
    """Whether the build would find every picture of a sample where it says, as it was written."""
    try:
        media = [locate(item, name, "image").read() for name in (*item.content.images, *item.content.videos)]
    except BrokenSample:
        return False
    return all(data == PICTURE for data in media)


def full_name(item, name):
    """The path of a picture, which a sample of a tar may call by what follows its key."""
    key = item.place["key"]
    whole = f"{key}.{name}"
    return whole if item.root is None and not name.startswith(f"{key}.") and whole in item.slices else name


def source_adds_up(rng, folder):
    source, count = write_source(rng, folder)
    items, ledger = source_items(source)
    good = [item for item in items if isinstance(item.content, Conversation) and all_found(item)]
    left = sum(ledger.left.values())
    assert ledger.files == count == sum(item.files for item in items) + left, (count, ledger, items)
    # By names and words: every file that is not in a rejected sample and not left is seen in a sample.
    # In a tar a sample shows files of its own group only, and may call them by what follows its key.
    seen = {full_name(item, name) for item in good for name in (*item.content.images, *item.content.videos)}
    words = [word for item in good for turn in item.content.turns for word in WORD.findall(turn.text)]
    rejected = sum(item.files for item in items if item not in good)
    used = count - left - rejected
    assert len(set(words)) == len(words) == len(good), "a text is in two samples, or in none"
    # A record of a folder may also show a picture of a sample that is rejected.
    assert used <= len(seen) + len(words) and (source.is_dir() or used == len(seen) + len(words)), (used, seen, items)
    assert [item.content for item in RecordSource(source).items(folder)] == [item.content for item in items]
    return len(good), len(items)


def sources_add_up(folder, count, seed):
    rng = random.Random(seed)
    good = read = 0
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        used, found = source_adds_up(rng, place)
        good, read = good + used, read + found
    assert read // 10 < good < read * 9 // 10


def test_records_turned_about(tmp_path):
    records_add_up(tmp_path, FAST_RECORDS, seed=0)


def test_sources_turned_about(tmp_path):
    sources_add_up(tmp_path, FAST_SOURCES, seed=0)


@pytest.mark.long
def test_15_000_records_turned_about(tmp_path):
    for part in range(RECORDS // BATCH):
        (tmp_path / str(part)).mkdir()
        records_add_up(tmp_path / str(part), BATCH, seed=part + 1)


@pytest.mark.long
def test_5_000_sources_turned_about(tmp_path):
    sources_add_up(tmp_path, SOURCES, seed=1)
