"""What verbs print fits 80 columns where nothing says how wide a terminal is; errors and what is pasted excepted."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_eagle.cli import command_line, main
from megatron_eagle.cli.common import Parser
from megatron_eagle.cluster.status import read_status, table
from megatron_eagle.config.shipped import shipped_recipes
from megatron_eagle.text import WIDTH, folded, in_line, stacked
from megatron_eagle.training.run_events import append_event

PASTED = ("layout: ", "model.recompute=")  # lines to copy into a recipe


def too_wide(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith(PASTED)]


def test_nothing_is_lost_where_lines_are_broken() -> None:
    text = "words " * 40 + "/" + "a" * 90
    assert folded(text).split() == text.split() and too_wide(folded(text)) == ["  /" + "a" * 90]
    fields = [f"field {number}" for number in range(40)]
    assert in_line(fields).replace("\n  ", "").split("  ") == fields and too_wide(in_line(fields)) == []
    rows = [["stage", "a", *("x" * 36 for _ in range(5))]]
    parts = list(stacked([""] * 7, rows, 3, keep=2))
    assert parts == [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5], [0, 1, 6]]
    assert list(stacked(["x"], [], 3, keep=1)) == [[0]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "eagle2-9b", "--ranks", "layout.pp=2"),
        ("plan", "tiny", "--gpus", "2", "--search"),
        ("recipe", "eagle2-9b", "--explain", "stages"),
        ("recipe", "eagle2-9b", "--explain", "model.attention"),
        ("curate", "operators"),
        ("data", "--help"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_verbs(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ), pytest.raises(SystemExit):  # doctor makes itself part of a run of one
        main(arguments)
    said = capsys.readouterr().out
    assert too_wide(said) == [] and len(said) > 60


def test_a_printed_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for name in shipped_recipes():
        with pytest.raises(SystemExit):
            main(["recipe", name])
        wide = too_wide(capsys.readouterr().out)
        assert [line for line in wide if line.lstrip().startswith("#")] == [], name


def test_help() -> None:
    """But for the examples, which are to be pasted."""

    def verbs(parser: Parser) -> list[Parser]:
        return [parser, *(one for below in parser.below.values() for one in verbs(below))]

    wide = {}
    for parser in verbs(command_line()):
        examples = (parser.epilog or "").splitlines()
        if found := [line for line in too_wide(parser.format_help()) if line not in examples]:
            wide[parser.prog] = found
    assert wide == {}


def test_the_table_of_a_chain(tmp_path: Path) -> None:
    step = {"loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.0, "useful_tokens": 1_234_567, "tokens": 2_000_000}
    more = {"tiles": 4, "seconds": 2.0, "data_wait": 0.1, "sample_digest": "d", "steps": 12000}
    for stage, job in (("stage1", "1234567"), ("stage1.5", "1234568"), ("stage2", "1234569")):
        append_event(tmp_path, "submitted", stage=stage, job=job, steps=12000, processes=1024)
        append_event(tmp_path, "started", stage=stage, job=job, nodes="n1", step=0, log_offset=0)
    cause = "rank 3 on node n2: " + "a long reason " * 20
    append_event(tmp_path, "ended", stage="stage1", step=9, outcome="failed", cause=cause, bad_nodes=["n2"])
    lines = "".join(json.dumps({"stage": "stage1", "step": n, **step, **more}) + "\n" for n in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(lines)
    text = table(read_status(tmp_path))
    assert too_wide(text) == [] and " ".join(text.split()).count("a long reason") == 20
