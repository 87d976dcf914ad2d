"""Benchmarks asked while a stage trains: the score that ``evaluate`` gives, and what is refused before a step."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import in_base64, write_tsv
from samples import image_bytes
from test_evaluating import train, write
from train_cases import metrics
from worlds import WorldError

from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.data.build.dataset import build_dataset

PNG = in_base64(image_bytes((40, 30), (200, 10, 10)))
ROW = {"image": PNG, "question": "Is it?"}


def ask(recipe_path: str, data: str, runs: str, out: str, limit: int) -> None:
    """In every process of a world: the newest checkpoint's answers to benchmark ``exact``."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.benchmarks.locate import parse_requests
    from megatron_eagle.evaluation.benchmarks.run import Wishes, evaluate_benchmarks
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    run, requests = RunFolder(Path(runs) / recipe.name), parse_requests("exact", Path(data))
    evaluate_benchmarks(recipe, recipe.stages[-1], run, requests, Path(out), install(), Wishes(limit))


def train_and_listen(recipe_path: str, runs: str, out: str) -> None:
    """``train``; what the first process printed, in ``out``."""
    import contextlib
    import io

    import torch.distributed as dist

    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(recipe_path, runs)
    if dist.get_rank() == 0:
        Path(out).write_text(said.getvalue())


def test_the_score_is_what_evaluate_says_of_the_checkpoint_and_broken_questions_are_wrong(
    small_run, worlds, tmp_path: Path
) -> None:
    """One question, whose answer is mostly "yes": what a few steps can learn. Broken: by its file, its text, pixels."""
    learnt = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "red.png").write_bytes(image_bytes((40, 30), (200, 10, 10)))
    records = [{"id": str(number), "image": "red.png", "conversations": learnt} for number in range(8)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset(tmp_path / "said.jsonl", tmp_path / "said")
    rows: list[dict[str, Any]] = [{"index": n, **ROW, "answer": "yes" if n % 4 else "no"} for n in range(8)]
    torn = in_base64(image_bytes((400, 300), (1, 2, 3))[:-40])
    rows[1] |= {"image": "!" * 99}
    rows[2] |= {"question": ""}
    rows[3] |= {"image": torn}
    write_tsv(tmp_path / "exact.tsv", [*rows, {"index": 9, **ROW, "answer": "beyond the limit"}])
    evaluation = {"every": 20, "benchmarks": ["exact=exact.tsv"], "benchmark_data": str(tmp_path), "limit": 8}
    stage = {"steps": 20, "checkpoint_every": 20, "learning_rate": 5e-3, "blend": [{"path": str(tmp_path / "said")}]}
    file = write(small_run, tmp_path / "r.yaml", evaluation, stage=stage)
    worlds(2).run(train_and_listen, file, str(tmp_path / "runs"), str(tmp_path / "said.txt"))
    heard = (tmp_path / "said.txt").read_text()
    assert "exact: 2 questions cannot be asked and are wrong; 1: a picture is not in base64" in heard
    assert "exact: 1 questions cannot be asked and are wrong; 3: " in heard
    worlds(2).run(ask, file, str(tmp_path), str(tmp_path / "runs"), str(tmp_path / "out"), 8)
    result = json.loads((tmp_path / "out" / "scores.json").read_text())["benchmarks"]["exact"]
    assert (result["value"], result["questions"], result["unreadable"]) == (37.5, 8, 3)
    assert metrics(tmp_path / "runs")[-1]["scores"] == {"exact": 0.375}


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("docvqa", None, "has no file for docvqa: none begins with docvqa"),
        ("docvqa=DocVQA_VAL.tsv", None, "docvqa: there is no file .*DocVQA_VAL.tsv"),
        ("docvqq", None, "no benchmark 'docvqq'.*did you mean docvqa"),
        ("mmvet", [{"index": 1, **ROW, "answer": "yes"}], "mmvet is scored by a judge, and none is asked while"),
        ("docvqa", [{"index": 1, **ROW}], "docvqa: .*docvqa.tsv has no answers to score against"),
        ("docvqa", [{"index": 1, **ROW, "image": "!" * 99}], "docvqa: none of 1 questions can be asked; 1: .*base64"),
    ],
)
def test_what_cannot_be_asked_or_scored_ends_the_run_before_its_first_step(
    small_run, worlds, tmp_path: Path, name: str, rows: list[dict[str, Any]] | None, message: str
) -> None:
    if rows:
        write_tsv(tmp_path / f"{name}.tsv", rows)
    file = write(small_run, tmp_path / "r.yaml", {"every": 2, "benchmarks": [name], "benchmark_data": str(tmp_path)})
    with pytest.raises(WorldError, match=f"stage 'second', evaluation: .*{message}"):
        worlds(2).run(train, file, str(tmp_path / "runs"))
    assert not (tmp_path / "runs" / "small" / "metrics.jsonl").exists()
