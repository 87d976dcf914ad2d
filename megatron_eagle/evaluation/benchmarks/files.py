"""Files of benchmarks as rows: VLMEvalKit's TSV, Hugging Face's Parquet, and lmms-eval's tasks over local Parquet.

A row is what a file says, with its pictures taken out into one file of their own, in which they are found by place: a
benchmark's pictures are gigabytes, and every process reads the few it needs. What is wrong with a row is said, not
raised: the row still counts.
"""

import base64
import binascii
import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks.literals import list_of

REFERENCE = 64  # a TSV's picture that is shorter is the index of the row that has it
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Row:
    """place: where in the file. fault: why it cannot be read, empty if it can be."""

    place: str
    fields: Mapping[str, Any]
    pictures: tuple[FileSlice, ...] = ()
    fault: str = ""


@dataclass
class PictureFile:
    """Writes pictures one behind the other."""

    path: Path
    _file: BinaryIO = field(init=False)

    def __enter__(self) -> "PictureFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> FileSlice:
        """Where the picture is from now on; raises ValueError if it has no bytes."""
        if not data:
            raise ValueError("a picture has 0 bytes")
        start = self._file.tell()
        self._file.write(data)
        return FileSlice(self.path, start, len(data))


def read_tsv(path: Path, pictures: PictureFile) -> list[Row]:
    """All rows of a TSV: pictures in base64 under ``image``, one or a list, or the index of the row that has them."""
    csv.field_size_limit(2**31 - 1)
    rows: list[Row] = []
    waiting: dict[int, str] = {}
    by_index: dict[str, Row] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t")
            header = next(lines, [])
            for number, cells in enumerate(lines, 1):
                row, refers = _tsv_row(f"row {number}", header, cells, pictures, path.parent)
                if refers:
                    waiting[len(rows)] = refers
                by_index.setdefault(str(row.fields.get("index")), row)
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as TSV: {error}") from None
    for place, index in waiting.items():
        rows[place] = _with_pictures_of(rows[place], by_index.get(index), index)
    return rows


def _tsv_row(place: str, header: list[str], cells: list[str], pictures: PictureFile, folder: Path) -> tuple[Row, str]:
    """(row, index of the row that has its picture)"""
    fields: dict[str, Any] = dict(zip(header, cells, strict=False))
    images = fields.pop("image", "")
    if len(cells) != len(header):
        return Row(place, fields, fault=f"{len(cells)} cells in a table of {len(header)} columns"), ""
    if 0 < len(images) <= REFERENCE:
        return Row(place, fields), images
    try:
        if images:
            found = [pictures.add(_from_base64(one)) for one in list_of(images)]
        else:
            found = [pictures.add((folder / name).read_bytes()) for name in list_of(fields.get("image_path") or "")]
    except (ValueError, OSError) as error:
        return Row(place, fields, fault=str(error)), ""
    return Row(place, fields, tuple(found)), ""


def _with_pictures_of(row: Row, other: Row | None, index: str) -> Row:
    if other is None or not other.pictures:
        which = "does not exist" if other is None else "has none that can be read"
        return Row(row.place, row.fields, fault=f"its picture is that of row {index!r}, which {which}")
    return Row(row.place, row.fields, other.pictures)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a picture is not in base64: {error} ({len(text)} characters)") from None


def read_parquet(paths: Iterable[Path], pictures: PictureFile) -> list[Row]:
    """All rows of Parquet files: pictures in columns of {bytes, path}, of lists of those, or of bytes."""
    rows = []
    for path in paths:
        try:
            for number, record in enumerate(_records(path), 1):
                rows.append(_parquet_row(f"{path.name}, row {number}", record, pictures, path.parent))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
    return rows


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _parquet_row(place: str, record: dict[str, Any], pictures: PictureFile, folder: Path) -> Row:
    fields, found = {}, []
    try:
        for name, value in record.items():
            items = value if isinstance(value, list) else [value]
            if not any(_is_picture(item) for item in items):
                fields[name] = value
                continue
            found += [pictures.add(_bytes_of(item, folder)) for item in items if item is not None]
    except (ValueError, OSError) as error:
        others = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
        return Row(place, others, fault=str(error))
    return Row(place, fields, tuple(found))


def _is_picture(item: Any) -> bool:
    return isinstance(item, bytes) or isinstance(item, dict) and item.keys() == {"bytes", "path"}


def _bytes_of(item: Any, folder: Path) -> bytes:
    if isinstance(item, bytes):
        return item
    data = item["bytes"] if item["bytes"] is not None else (folder / str(item["path"])).read_bytes()
    return bytes(data)
