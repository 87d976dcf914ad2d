"""Small records, media and folders that the tests of ``tests/cases`` are made of."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from samples import image_bytes

from megatron_eagle.cli import main
from megatron_eagle.data.build.forms.keys import Ignored
from megatron_eagle.data.build.forms.registry import ReadRecord, Rules, read_record
from megatron_eagle.data.build.sources import Item, RecordSource
from megatron_eagle.data.build.walk import Ledger
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.errors import BrokenSample

RED, GREEN, BLUE = (image_bytes((16, 12), colour, "JPEG") for colour in ("red", "green", "blue"))


def says(*turns: tuple[str, str], **fields) -> dict:
    """A record of ``conversations``."""
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def asks(text: str, answer: str = "Yes.", **fields) -> dict:
    """A record of one question."""
    return says(("human", text), ("gpt", answer), **fields)


def read(record: object, ignore: tuple[str, ...] = ()) -> ReadRecord:
    return read_record(record, Rules(ignored=Ignored(frozenset(ignore))), "default")


def conversation(record: object, ignore: tuple[str, ...] = ()) -> Conversation:
    return read(record, ignore).conversation


def reason(record: object, ignore: tuple[str, ...] = ()) -> str:
    """Why a record is refused, in one line of no more than a few hundred characters."""
    try:
        made = read(record, ignore)
    except BrokenSample as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return str(error)
    raise AssertionError(f"read as {made}")


def texts(made: Conversation) -> list[str]:
    return [turn.text for turn in made.turns]


def source_items(path: Path, ignore: tuple[str, ...] = (), **options) -> tuple[list[Item], Ledger]:
    """Everything a source gives, and what became of its files."""
    ledger = Ledger()
    source = RecordSource(path, ignored=frozenset(ignore), **options)
    source.describe()
    return list(source.items(path.parent / "scratch", ledger)), ledger


def contents(items: list[Item]) -> list[Conversation | str]:
    return [item.content for item in items]


def write_files(folder: Path, files: dict[str, bytes | str | dict]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_bytes(content))
    return folder


def as_bytes(content: bytes | str | dict | list) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def write_tar(path: Path, members: list[tuple[str, bytes | str | dict | tarfile.TarInfo]], mode: str = "w") -> Path:
    """A tar of (name, content); a TarInfo stands for a member without content, such as a link."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            data = as_bytes(content)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def build(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What ``megatron-eagle data build`` prints; it must end well."""
    with pytest.raises(SystemExit) as stopped:
        main(["data", "build", *map(str, arguments)])
    printed = capsys.readouterr()
    assert not stopped.value.code, printed.err
    return printed.out
