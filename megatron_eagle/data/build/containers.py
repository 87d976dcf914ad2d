"""Files that hold records: JSONL, a JSON array, either of them in gzip, and Parquet. The content says which it is.

Everything is read as a stream, one record after another, so a file may be larger than memory. What follows damage is
not guessed at: the last thing that comes out says where reading ended.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_eagle.data.media.sniff import HEAD, sniff
from megatron_eagle.errors import BrokenSample, UserError

CHUNK = 1 << 16  # characters read at a time
MAX_RECORD = 1 << 28  # characters of one element of an array
MAX_OBJECT = 1 << 26  # bytes of a file that may be one object
ROWS = 64  # of a Parquet file, read at a time
READ = "JSONL, a JSON array, either in gzip, Parquet, a tar or tar.gz, or a folder"


@dataclass(frozen=True)
class FoundRecord:
    """A record where it was found, or the reason why there is none.

    name: stands in for a missing id. weight: its bytes, or 1 where the size of the whole is not known beforehand.
    """

    place: dict[str, Any]
    name: str
    record: Any
    reason: str | None
    weight: int = 1


def parse_json(data: bytes, what: str, *, mark: bool = False) -> Any:
    """Decoded JSON in which no key is given twice; mark: a byte order mark may come first. Raises BrokenSample."""
    try:
        text = data.decode("utf-8-sig" if mark else "utf-8")
    except UnicodeDecodeError as error:
        raise BrokenSample(f"{what} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    strict = _Decoder()
    try:
        value = strict.decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"{what} is not JSON: {error}") from None
    strict.check()
    return value


class _Decoder:
    """A JSON decoder that remembers keys given twice, of which a plain one keeps the last and loses the first."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice += [name for name in made if names.count(name) > 1]
        return made

    def check(self) -> None:
        """Raises BrokenSample if what was decoded since the last check had a key twice."""
        twice, self._twice = self._twice, []
        if twice:
            raise BrokenSample(f"key {twice[0][:100]!r} is given twice")

    def forget(self) -> None:
        self._twice = []


def container_of(path: Path) -> str:
    """What a file is by its content: tar, tar.gz, parquet or text; raises UserError, in one line, if it is not read."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    name = sniff(head).name
    if name == "gzip":
        try:
            with gzip.open(path, "rb") as inner:
                head = inner.read(HEAD)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            head = b""  # damaged: reading it says where
        return "tar.gz" if sniff(head).name == "tar" or path.name.endswith((".tar.gz", ".tgz")) else "text"
    if name == "Parquet":
        _open_table(path).close()
        return "parquet"
    if name == "tar":
        return name
    if path.suffix == ".tar":
        return "tar"  # of the old kind without a mark, or damaged
    if sniff(head).kind is not None:
        raise UserError(f"{path} is {name}, which is no source; this reads {READ}")
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx", ".arrow", ".lmdb", ".mdb"):
        raise UserError(f"{path} is a {path.suffix} file, which is no source; this reads {READ}")
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{path} is no Parquet file: it does not begin with PAR1")
    _refuse_recipe(path, head)
    return "text"


def _refuse_recipe(path: Path, head: bytes) -> None:
    """A list of annotation files (Eagle's and InternVL's recipes) is not itself data."""
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") or path.stat().st_size > MAX_OBJECT:
        return
    with open(path, "rb") as file:
        first = file.readline()
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            try:
                value = json.loads(first + file.read())
            except (ValueError, RecursionError):
                return
    parts = list(value.values()) if isinstance(value, dict) else []
    if parts and all(isinstance(part, dict) and "annotation" in part for part in parts):
        raise UserError(
            f"{path} is a recipe of {len(parts)} data sets, not one; build each of them: "
            f"data build {parts[0]['annotation']} OUT --media-root {parts[0].get('root') or '.'}"
        )


def read_records(path: Path) -> Iterator[FoundRecord]:
    """Every record of a text or Parquet file in order; raises OSError or UserError if it cannot be opened."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    name = sniff(head).name
    if name == "Parquet":
        yield from _read_rows(path)
        return
    packed = name == "gzip"
    with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
        yield from _read_text(stream, path, packed)  # type: ignore[arg-type]


def _read_text(stream: BinaryIO, path: Path, packed: bool) -> Iterator[FoundRecord]:
    last = "the beginning"
    found = _begin_text(stream, path)
    while True:
        try:
            one = next(found, None)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = f"{path.name} is cut off or damaged after {last}: {' '.join(str(error).split())}"
            yield FoundRecord({"after": last}, f"after {last}", None, reason)
            return
        if one is None:
            return
        last = " ".join(f"{name} {value}" for name, value in one.place.items())
        yield one if not packed else FoundRecord(one.place, one.name, one.record, one.reason)


def _begin_text(stream: BinaryIO, path: Path) -> Iterator[FoundRecord]:
    """Tells an array and a single object from lines by how the text begins."""
    start = b""
    while not start.strip(b"\xef\xbb\xbf \t\r\n"):
        line = stream.readline(CHUNK)
        if not line:
            return
        start += line
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return (yield from _read_array(_Rest(start, stream)))
    whole = _single_object(start, stream, path)
    if isinstance(whole, bytes):
        return (yield from _read_lines(_Rest(whole, stream)))
    yield whole


def _single_object(start: bytes, stream: BinaryIO, path: Path) -> FoundRecord | bytes:
    """The one record of a .json file over many lines, or what has been read of something else."""
    if not path.name.removesuffix(".gz").endswith(".json") or not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return start
    if start.strip().endswith(b"}"):
        return start
    start += stream.read(MAX_OBJECT)
    try:
        return FoundRecord({"record": 1}, "record-1", parse_json(start, "file", mark=True), None, len(start))
    except BrokenSample:
        return start


class _Rest(io.RawIOBase):
    """What has been read already, and then the rest of a stream."""

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        self._start, self._stream = start, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start[: len(buffer)] or self._stream.read(len(buffer))
        self._start = self._start[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _read_lines(stream: io.RawIOBase) -> Iterator[FoundRecord]:
    for number, line in enumerate(io.BufferedReader(stream), 1):
        if not line.strip():
            continue
        place, name = {"line": number}, f"line-{number}"
        try:
            yield FoundRecord(place, name, parse_json(line, "line", mark=number == 1), None, len(line))
        except BrokenSample as error:
            yield FoundRecord(place, name, None, str(error), len(line))


def _read_array(stream: io.RawIOBase) -> Iterator[FoundRecord]:
    text = _Text(io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig"))
    strict = _Decoder()
    done = 0
    try:
        text.next_word()
        text.place += 1
        if text.next_word() == "]":
            text.place += 1
        else:
            for number in text.elements():
                place, name, before = {"record": number}, f"record-{number}", text.place
                value = text.decode(strict)
                weight, done = text.place - before, number
                try:
                    strict.check()
                    yield FoundRecord(place, name, value, None, weight)
                except BrokenSample as error:
                    yield FoundRecord(place, name, None, str(error), weight)
        if text.next_word():
            yield _ended(done, "text follows the end of the array and is not read")
    except UnicodeDecodeError as error:
        yield _ended(done, f"not UTF-8 text: {error.reason}")
    except (ValueError, RecursionError) as error:
        yield _ended(done, f"not JSON: {error}; nothing after it is read")


def _ended(number: int, why: str) -> FoundRecord:
    return FoundRecord({"after": f"record {number}"}, f"after-{number}", None, f"array, after record {number}: {why}")


class _Text:
    """A window on a long text: ``place`` is where reading stands in what is held of it."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream, self._held, self._ended = stream, "", False
        self.place = 0

    def _more(self) -> bool:
        """Reads on, as much again as one value has taken so far; False at the end."""
        chunk = self._stream.read(max(CHUNK, len(self._held) - self.place))
        self._held = self._held[self.place :] + chunk
        self.place = 0
        self._ended = not chunk
        return bool(chunk)

    def next_word(self) -> str:
        """The next character that is no space, where reading then stands; empty at the end."""
        while True:
            while self.place < len(self._held):
                if not self._held[self.place].isspace():
                    return self._held[self.place]
                self.place += 1
            if not self._more():
                return ""

    def elements(self) -> Iterator[int]:
        """Numbers of the array's elements, from 1; the caller reads each. Raises ValueError if the array is damaged."""
        number = 0
        while True:
            number += 1
            yield number
            word = self.next_word()
            if word not in (",", "]"):
                raise ValueError(f"expected ',' or ']', found {word!r}" if word else "the array is cut off")
            self.place += 1
            if word == "]":
                return
            self.next_word()

    def decode(self, strict: _Decoder) -> Any:
        """The value that begins here; raises ValueError if there is none."""
        self.next_word()
        while True:
            strict.forget()
            try:
                value, end = strict.decoder.raw_decode(self._held, self.place)
            except json.JSONDecodeError as error:
                open_end = error.msg.startswith("Unterminated") or error.pos >= len(self._held) - 16
                if len(self._held) - self.place > MAX_RECORD or not (open_end and self._more()):
                    raise ValueError(f"{error.msg} ({error.pos - self.place} characters into the record)") from None
                continue
            if end == len(self._held) and self._more():  # a number may go on
                continue
            self.place = end
            return value


def _open_table(path: Path) -> Any:
    """A Parquet file; raises UserError, in one line, if it is none that can be read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no readable Parquet file: {' '.join(str(error).split())}") from None


def _read_rows(path: Path) -> Iterator[FoundRecord]:
    number = 0
    with _open_table(path) as file:
        import pyarrow

        try:
            for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield FoundRecord({"row": number}, f"row-{number}", row, None)
        except (pyarrow.ArrowException, OSError) as error:
            why = f"damaged after row {number}: {' '.join(str(error).split())}"
            yield FoundRecord({"after": f"row {number}"}, f"after-{number}", None, why)
