"""Two small runs that differ in known places: the comparison names these and nothing else, and shows what came out."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_eagle.checkpoint.best import Best, note_if_best
from megatron_eagle.checkpoint.files import DESCRIPTION, Description
from megatron_eagle.cli import main
from megatron_eagle.errors import UserError
from megatron_eagle.runs.compare import as_text, compare, write_page
from megatron_eagle.runs.found import find_runs, read_run
from megatron_eagle.training.log import StepRecord

pytestmark = pytest.mark.unit
RECORD = StepRecord(
    stage="s1",
    step=1,
    steps=40,
    loss=2.0,
    learning_rate=1e-3,
    grad_norm=1.0,
    useful_tokens=900,
    tokens=1000,
    tiles=4,
    seconds=0.5,
    data_wait=0.1,
    sample_digest="0" * 16,
)


def made_run(folder: Path, *, loss: float, recipe: dict, packages: dict, accuracy: float | None = None) -> Path:
    (folder / "starts").mkdir(parents=True)
    who = {"stage": "s1", "version": "1", "commit": "abc", "packages": packages, "recipe": recipe, "processes": 2}
    (folder / "starts" / "1").write_text(json.dumps({"pid": 1}))  # one that ended before it said what it was
    (folder / "starts" / "2").write_text(json.dumps(who))
    records = [replace(RECORD, step=step, loss=loss + 1 / step) for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    if accuracy is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "accuracy.json").write_text(json.dumps({"overall": accuracy}))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    same = {"seed": 1, "layout.tp": 1}
    first = {**same, "optimizer.beta2": 0.95}
    second = {**same, "optimizer.beta2": 0.999, "stages.s1.gpus": None}
    return [
        made_run(tmp_path / "a", loss=1.0, recipe=first, packages={"torch": "2.11"}, accuracy=0.5),
        made_run(tmp_path / "b<i>", loss=0.5, recipe=second, packages={"torch": "2.12"}),
    ]


def test_what_differs_is_named_and_nothing_else(pair: list[Path]) -> None:
    found = compare([read_run(folder) for folder in pair])
    assert found.differences == (
        ("optimizer.beta2", ("0.95", "0.999")),
        ("packages.torch", ("2.11", "2.12")),
        ("stages.s1.gpus", ("-", "null")),
    )


def test_long_values_that_differ_late_are_told_apart(tmp_path: Path) -> None:
    paths = [f"/data/{'x' * 80}/v{number}/samples" for number in (1, 2)]
    made = [
        made_run(tmp_path / path[-9], loss=1.0, recipe={"stages.s1.blend.0.path": path}, packages={}) for path in paths
    ]
    ((key, values),) = compare([read_run(folder) for folder in made]).differences
    assert key == "stages.s1.blend.0.path" and values[0] != values[1] and "/v1/samples" in values[0]


def test_what_came_out_is_counted(pair: list[Path]) -> None:
    text = as_text(compare([read_run(folder) for folder in pair]))
    last_twenty = sum(1 / step for step in range(21, 41)) / 20
    row = next(line for line in text.splitlines() if line.startswith("| s1    | a"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["s1", "a", "40/40", f"{1 + last_twenty:.4f}", "36,000", "1,800", "10.0 %", "20s", "-"]
    assert "a: 50.0 % right, b<i>: - right" in text


def test_the_page_stands_alone_and_escapes_names(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "pages" / "both.html"
    write_page(compare([read_run(folder) for folder in pair]), out)
    page = out.read_text()
    assert "b&lt;i&gt;" in page and "<i>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("names", [["a"], ["a", "a"]])
def test_one_run_is_not_compared_with_itself(pair: list[Path], names: list[str]) -> None:
    with pytest.raises(UserError, match="two or more runs of different names"):
        compare([read_run(pair[0].parent / name) for name in names])


def test_runs_are_listed_and_only_older_checkpoints_are_cleaned(pair: list[Path], tmp_path: Path, capsys) -> None:
    assert find_runs(tmp_path) == pair
    stage, kept = pair[0] / "checkpoints" / "s1", {"step_00000005", "step_30", "step_40"}
    note_if_best(make(stage), Best(5, 0.5))
    for step in (10, 20, 30, 40):
        (stage / f"step_{step}").mkdir(parents=True)
        (stage / f"step_{step}" / "weights").write_bytes(b"x" * 1000)
    (stage / "step_50.partial").mkdir()  # of a trainer at work
    (stage / "latest").write_text("step_30\n")
    newest = Description("s1", 30, 40, {}, {}, 1, peak_rss_bytes=2_500_000_000)
    (stage / "step_30" / DESCRIPTION).write_text(json.dumps(asdict(newest)))
    assert run("runs", "list", "--runs", str(tmp_path), capsys=capsys).count("40/40") == 2
    assert read_run(pair[0]).peak_bytes == {"s1": 2_500_000_000}
    said = run("runs", "clean", str(pair[0]), capsys=capsys)
    assert "2 checkpoints" in said and "--yes deletes them" in said
    assert {path.name for path in stage.glob("step_*[0-9]")} == kept | {"step_10", "step_20"}
    run("runs", "clean", str(pair[0]), "--yes", capsys=capsys)
    assert {path.name for path in stage.glob("step_*[0-9]")} == kept


def make(stage: Path) -> Path:
    """A stage's folder with the checkpoint of step 5, by the name that checkpoints have."""
    (stage / "step_00000005").mkdir(parents=True)
    return stage


def run(*arguments: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    said = capsys.readouterr()
    assert stopped.value.code == 0, said
    return said.out
