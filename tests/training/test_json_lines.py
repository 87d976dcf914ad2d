"""Files of a run on disks that fill: a line is whole or its writer hears of it, and a piece costs only itself."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_disk import small_disk, small_quota

from megatron_eagle.cluster.events import read_events
from megatron_eagle.errors import UserError
from megatron_eagle.training.json_lines import append_text, read_lines
from megatron_eagle.training.log import StepRecord, TrainingLog, read_metrics
from megatron_eagle.training.run_events import append_event

LINE = json.dumps({"event": "e", "padding": "x" * 9000}) + "\n"


def fill(folder: Path) -> int:
    """Append to ``folder/log`` until the disk takes no more; the error's number."""
    taken = 0
    while taken < 10_000:
        try:
            append_text(folder / "log", LINE, durable=True)
        except OSError as error:
            lines = read_lines(folder / "log")
            assert len(lines.entries) == taken and len(lines.torn) <= 1, "all that were taken, and at most one piece"
            return error.errno or 0
        taken += 1
    raise AssertionError("it takes everything")


def recovers(folder: Path, make_room: Path) -> None:
    """With room again the next line stands on its own, and the piece is counted."""
    torn = len(read_lines(folder / "log").torn)
    make_room.unlink()
    append_text(folder / "log", LINE, durable=True)
    lines = read_lines(folder / "log")
    assert lines.entries[-1][1]["event"] == "e" and len(lines.torn) == torn


@pytest.mark.parametrize("times", [1, 2])
def test_a_stale_handle_is_opened_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """As after a restart of the file server."""
    log = open_log(tmp_path)
    stale, write = iter([True] * times), os.write

    def stale_at_first(handle: int, data: bytes) -> int:
        if next(stale, False):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return write(handle, data)

    monkeypatch.setattr(os, "write", stale_at_first)
    if times == 1:
        log.step(record(1))
    else:
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: Stale file handle"):
            log.step(record(1))
    assert [entry["step"] for _, entry in read_lines(tmp_path / "metrics.jsonl").entries] == [1] * (times == 1)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        (disk / "ballast").write_bytes(bytes(200_000))
        assert fill(disk) == errno.ENOSPC
        recovers(disk, disk / "ballast")


@pytest.mark.slow
def test_a_quota(tmp_path: Path) -> None:
    """It is named by the trainer's log as it is by the events."""
    with small_quota(tmp_path / "disk", megabytes=1) as disk:
        log = open_log(disk)
        assert fill(disk) == errno.EDQUOT
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: Disk quota exceeded"):
            for step in range(1, 4000):
                log.step(record(step, rejected=[("s" * 50_000, "r")]))
        with pytest.raises(OSError, match="Disk quota exceeded"):
            for _ in range(200):
                append_event(disk, "submitted", stage="s" * 20_000)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_37_bytes_of_a_line_says_so(tmp_path: Path) -> None:
    append_event(tmp_path, "submitted", stage="a")
    path = tmp_path / "events.jsonl"
    with largest_file(path.stat().st_size + 37), pytest.raises(OSError) as error:
        append_event(tmp_path, "submitted", stage="b")
    assert error.value.errno == errno.EFBIG and len(path.read_text().splitlines()[1]) == 37
    append_event(tmp_path, "submitted", stage="c")
    said: list[str] = []
    assert [event["stage"] for event in read_events(tmp_path, said.append)] == ["a", "c"]
    assert said == [f"{path}: 1 torn line(s) left out (line 2)"]


def test_a_device_that_is_full() -> None:
    with pytest.raises(OSError) as error:
        append_text(Path("/dev/full"), LINE, durable=False)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "piece",
    [b'{"stage": "a", "st', b"\x00" * 40, b'{"x": "\xc3', b"17", b'": 3}', b'{"a": 1}{"event": "e"}', b"[1, 2]"],
)
def test_pieces_are_left_out_wherever_they_are(tmp_path: Path, piece: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(piece + b"\n" + LINE.encode() + piece + b"\n\n" + LINE.encode() + piece)
    append_text(path, LINE, durable=False)
    lines = read_lines(path)
    assert [number for number, _ in lines.entries] == [2, 5, 7] and lines.torn == (1, 3, 6)


def test_a_whole_line_that_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(LINE.rstrip("\n"))
    append_text(path, LINE, durable=False)
    assert len(read_lines(path).entries) == 2 and not read_lines(path).torn


def test_writers_of_one_node_do_not_mix_their_lines(tmp_path: Path) -> None:
    children = []
    for child in range(4):
        if (process := os.fork()) == 0:
            for number in range(100):
                append_event(tmp_path, "e", child=child, number=number, padding="x" * 5000)
            os._exit(0)
        children.append(process)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len({(event["child"], event["number"]) for event in read_events(tmp_path, pytest.fail)}) == 400


def record(step: int, **changes) -> StepRecord:
    counts = {"useful_tokens": 9, "tokens": 10, "tiles": 1, "seconds": 1.0, "data_wait": 0.0, "sample_digest": "d"}
    rejected = changes.get("rejected", [])
    return StepRecord("s", step, 4000, 1.0, 1e-3, 1.0, **counts, rejected=rejected, rejected_total=len(rejected))


def open_log(folder: Path, resumed_at: int = 0) -> TrainingLog:
    options = {"tensorboard": False, "wandb_project": None}
    return TrainingLog(folder, stage="s", total_steps=4000, resumed_at=resumed_at, **options)


def test_a_piece_inside_the_metrics_stops_neither_status_nor_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.step(record(step))
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:37] + b"\n" + third)
    said: list[str] = []
    assert [entry.step for entry in read_metrics(tmp_path, said.append)["s"]] == [1, 3]
    assert said == [f"{path}: 1 torn line(s) left out (line 2)"]
    with open_log(tmp_path, resumed_at=3) as log:
        log.step(record(4))
    assert "1 torn line(s) left out (line 2)" in capsys.readouterr().err
    assert [entry.step for entry in read_metrics(tmp_path, pytest.fail)["s"]] == [1, 3, 4]
