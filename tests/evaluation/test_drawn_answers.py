"""``evaluate --temperature``: equal seeds give equal answers in any layout, and results say how they were drawn."""

import json
from pathlib import Path

from benchmark_files import made_questions, made_tsv
from train_cases import train

DRAWN = ["--temperature", "3", "--top-p", "0.9", "--seed"]


def ask(recipe_path: str, runs: str, out: str, *arguments: str) -> None:
    """In every process of a world: ``evaluate`` of stage ``first``."""
    from megatron_eagle.cli import main

    where = ["--stage", "first", "--runs", runs, "--out", out]
    try:
        main(["evaluate", recipe_path, *where, "--answer-tokens", "3", *arguments])
    except SystemExit as end:
        assert end.code == 0


def test_equal_seeds_give_equal_answers_in_any_layout(small_run, worlds, tmp_path: Path) -> None:
    recipe, runs = str(small_run.write_recipe(tmp_path / "r.yaml")), str(tmp_path / "runs")
    worlds(1).run(train, recipe, "first", runs)
    heldout = str(small_run.folder / "heldout")

    def answers(processes: int, name: str, *arguments: str, of: str = "prediction") -> list[str]:
        worlds(processes).run(ask, recipe, runs, str(tmp_path / name), *arguments)
        (file,) = (tmp_path / name).rglob("predictions.jsonl")
        return [json.loads(line)[of] for line in file.open(encoding="utf-8")]

    whole = ("--data", heldout)
    greedy, one = answers(1, "greedy", *whole), answers(1, "one", *whole, *DRAWN, "1")
    assert one == answers(2, "tp", "layout.tp=2", *whole, *DRAWN, "1")
    assert one == answers(2, "replicas", *whole, *DRAWN, "1")
    assert one != answers(2, "other", *whole, *DRAWN, "2") and greedy != one
    said = {name: json.loads((tmp_path / name / "accuracy.json").read_text()) for name in ("greedy", "tp")}
    assert said["tp"]["sampling"] == {"temperature": 3.0, "top_p": 0.9, "seed": 1} and "sampling" not in said["greedy"]

    made_tsv(tmp_path / "exact.tsv", made_questions(small_run.folder / "heldout"))
    benchmark = ("--data", str(tmp_path), "--benchmarks", "exact")
    one = answers(1, "b1", *benchmark, *DRAWN, "1")
    assert one == answers(2, "b2", "layout.pp=2", *benchmark, *DRAWN, "1")
    assert json.loads((tmp_path / "b2" / "scores.json").read_text())["sampling"]["seed"] == 1
    assert "answers are drawn: " in (tmp_path / "b2" / "benchmarks.html").read_text()
