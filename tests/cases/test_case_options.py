"""Numbers among the options of all verbs: each has a range, and what is outside of it is said in one line."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_eagle.cli import command_line, main
from megatron_eagle.cli.common import Number, Parser
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.data.reports.pack_report import lognormal_lengths
from megatron_eagle.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


def parsers(parser: Parser) -> Iterator[Parser]:
    yield parser
    for below in parser.below.values():
        yield from parsers(below)


PARSERS = list(parsers(command_line()))
NUMBERS = [(p.prog, a) for p in PARSERS for a in p._actions if isinstance(a.type, Number)]


def test_no_option_takes_a_bare_number_or_an_abbreviation() -> None:
    assert len(PARSERS) > 15 and len(NUMBERS) > 25
    for parser in PARSERS:
        assert isinstance(parser, Parser) and not parser.allow_abbrev, parser.prog
        for action in parser._actions:
            assert action.type not in (int, float, bool, complex), (parser.prog, action.option_strings)
            if isinstance(action.default, int | float) and not isinstance(action.default, bool) and action.nargs != 0:
                assert isinstance(action.type, Number), (parser.prog, action.option_strings)
                assert action.type(str(action.default)) == action.default


@pytest.mark.parametrize(("prog", "action"), NUMBERS, ids=lambda value: getattr(value, "dest", value))
def test_what_is_no_number_is_none_of_any_option(prog: str, action: argparse.Action) -> None:
    assert isinstance(action.type, Number)
    for text in ("nan", "inf", "-inf", "", "x", "1:30", "true", "0x", "\u00b2", "1e999", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="number") as refused:
            action.type(text)
        assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)
    if action.type.range.whole:
        for text in ("010", "1.5", "1e3", "--1", "1_", "0x10"):
            with pytest.raises(argparse.ArgumentTypeError, match="a whole number"):
                action.type(text)


PLAN = ["plan", "eagle2-1b", "--stage", "stage1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*PLAN, "--gpus", "0"], "argument --gpus: a whole number of at least 1 is wanted (got 0)"),
        ([*PLAN, "--gpus", "-4"], "(got -4)"),
        ([*PLAN, "--search", "--gpus", "0"], "argument --gpus"),
        ([*PLAN, "--batch", "0"], "argument --batch"),
        ([*PLAN, "--pack-length", "0"], "argument --pack-length"),
        (
            [*PLAN, "--visual", "2"],
            "--visual: a finite number of at least 0 and at most 1 is wanted (got 2.0)",
        ),
        ([*PLAN, "--visual", "-1"], "(got -1.0)"),
        ([*PLAN, "--visual", "nan"], "(got nan)"),
        ([*PLAN, "--tokens-per-sample", "0"], "argument --tokens-per-sample: a finite number of at least 1"),
        ([*PLAN, "--tokens-per-sample", "-5"], "(got -5.0)"),
        ([*PLAN, "--gpu", "h10"], "did you mean h100?"),
        ([*PLAN, "--pack-length", "10"], "stage 'stage1': pack_length=10 cannot hold one tile of 256 tokens"),
        ([*PLAN, "--batc", "4"], "unrecognized arguments: --batc 4; did you mean --batch?"),
        (["plan", "eagle2-1b", "--stage", "stag1"], "did you mean stage1?"),
        (["data", "digest", "tiny", "--dp", "0"], "argument --dp"),
        (["data", "digest", "tiny", "--packs", "-1"], "argument --packs"),
        (["data", "pack-report", "tiny", "--ranks", "0"], "argument --ranks"),
        (["data", "pack-report", "--lognormal", "0", "1"], "median 0 and sigma 1, 0.00% are from 16 to 16384"),
        (["data", "pack-report", "--lognormal", "700", "-1"], "argument --lognormal"),
        (["data", "pack-report", "--lognormal", "700", "1", "--pack-length", "10"], "0.00% are from 16 to 10"),
        (["data", "inspect", "tiny", "--out", "o", "--shown", "-1"], "argument --shown"),
        (["data", "build", "a", "b", "--part", "0/3"], "argument --part"),
        (["data", "build", "a", "b", "--samples-per-shard", "0"], "argument --samples-per-shard"),
        (["convert", "hf-to-megatron", "a", "b", "--tile-size", "0"], "argument --tile-size"),
        (["evaluate", "tiny", "--data", "d", "--answer-tokens", "0"], "argument --answer-tokens"),
        (["verify", "--sample", "0"], "argument --sample"),
        (["status", "r", "--every", "0"], "argument --every: a finite number above 0"),
        (["doctor", "--timeout", "inf"], "argument --timeout"),
        (["demo", "--processes", "0"], "argument --processes"),
        (["train", "tiny", "--stage", "stage1", "--hang", "1,2,3"], "four numbers F,A,O,G are wanted"),
        (["train", "tiny", "--stage", "stage1", "--hang", "1,2,3,nan"], "(got nan)"),
        (["bench", "tiny", "--stage", "stage1", "--steps", "-1"], "argument --steps"),
        (["bench", "tiny", "--stage", "stage1", "--layers", "5", "layout.pp=2"], "does not divide 5 layers"),
        (["job", "end", "--run", "r", "--stage", "s", "--job", "1", "--log", "l", "--failures", "-1"], "--failures"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_options_end_in_one_line(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and words in said.err, said
    assert said.err.count("\n") == 1 and said.out == ""


def test_a_stage_is_changed_as_a_recipe_would_be() -> None:
    recipe = load_recipe(EXAMPLES / "eagle2-1b" / "recipe.yaml")
    changed = recipe.with_stage("stage1", batch=7, pack_length=None)
    assert changed.stage("stage1").batch == 7 and changed.stages[1:] == recipe.stages[1:]
    for change in ({"batch": 0}, {"pack_length": 10}, {"steps": True}, {"learning_rate": float("nan")}):
        with pytest.raises(UserError, match=r"^(stage 'stage1'|batch|steps|learning_rate): [^\n]*$"):
            recipe.with_stage("stage1", **change)


@pytest.mark.parametrize(
    ("median", "sigma", "length"), [(0, 1, 512), (1, 0.1, 512), (9999, 0, 512), (700, 1000, 512), (99, 1, 9)]
)
def test_lengths_that_would_be_drawn_for_ever_are_refused(median: float, sigma: float, length: int) -> None:
    with pytest.raises(UserError, match=f"are from 16 to {length}"):
        lognormal_lengths(10, median, sigma, length)


def test_equal_lengths_are_lengths() -> None:
    assert np.unique(lognormal_lengths(10, 100.5, 0, 512)).tolist() == [100]
