"""Progress: a bar on a terminal, plain lines in a log, nothing under --quiet; one module draws."""

import argparse
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eagle import progress
from megatron_eagle.cli import convert
from megatron_eagle.progress import Progress, is_quiet, quiet

PACKAGE = Path(progress.__file__).parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(bar: Progress, times: int, pause: float) -> None:
    with bar:
        for _ in range(times):
            time.sleep(pause)
            bar.update()


def test_a_log_gets_lines_seldom_and_no_carriage_return(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress.SECONDS_BETWEEN_LINES == 30
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    began = time.monotonic()
    work(Progress("reading", total=40, unit="samples"), 40, 0.01)
    most = (time.monotonic() - began) / 0.1 + 1
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert 2 <= len(lines) <= most and "\r" not in text and "\033" not in text
    assert re.fullmatch(r"reading: \d+ of 40 samples, \d+ %, 00:00 passed, 00:0\d left", lines[0])
    assert lines[-1].startswith("reading: 40 of 40 samples, 100 %")


def test_the_end_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    work(Progress("rows", total=2, unit="row"), 2, 0.03)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "rows: 1 of 2 row",
        "rows: 2 of 2 row",
    ]


def test_what_takes_less_than_that_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work(Progress("reading", total=5, unit="samples"), 5, 0)
    assert list(Progress("packs", range(5), unit="pack")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [None, 0])
def test_a_total_that_is_not_known_is_not_made_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    work(Progress("asking", total=total, unit="answers"), 3, 0.02)
    assert re.match(r"asking: \d answers, 00:00 passed, .*answers/s\n", capsys.readouterr().err)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", 0)
    bar = Progress("reading", total=2, unit="samples")
    work(bar, 2, 0)
    assert "\r" in sys.stderr.getvalue() and "reading:   0%|" in sys.stderr.getvalue()


def test_quiet_shows_nothing_and_ends_with_its_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with quiet():
        with Progress("rows", total=3, unit="row") as bar:
            bar.say("a result is no progress")
            bar.update()
        assert is_quiet() and list(Progress("packs", [1, 2], unit="pack")) == [1, 2]
    assert not is_quiet() and capsys.readouterr() == ("a result is no progress\n", "")


@pytest.mark.parametrize("action", ["hf-to-megatron a b", "megatron-to-hf a b", "peft-to-megatron a b c", "check a b"])
def test_conversions_that_show_how_far_they_are_have_quiet(action: str) -> None:
    parser = argparse.ArgumentParser()
    convert.add_actions(parser)
    assert parser.parse_args([*action.split(), "--quiet"]).quiet


def test_nothing_else_draws_or_colours() -> None:
    """Colours would have to heed NO_COLOR; there are none."""
    texts = {file: file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    drawing = {str(file.relative_to(PACKAGE)) for file, text in texts.items() if "tqdm" in text}
    assert drawing == {"progress.py"}
    assert [str(file) for file, text in texts.items() if re.search(r"(\\033|\\x1b|\\e)\[[0-9;]*m", text)] == []


def test_a_reader_that_has_enough_is_no_error() -> None:
    line = f"'{sys.executable}' -m megatron_eagle recipe eagle2-9b | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
