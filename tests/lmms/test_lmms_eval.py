"""lmms-eval itself, from its command line, runs a local task on a checkpoint: the accuracy is that of ``evaluate``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_files import made_parquet, made_questions, made_task
from project import ROOT
from train_cases import answer, train

TOKENS = 4  # of an answer, as the task says


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where lmms-eval runs: its packages, this checkout, and the entry points that an installation would have."""
    given = request.config.getoption("--lmms-packages")
    folder = str(Path(given).absolute()) if given else ""  # lmms-eval runs in another folder
    found = subprocess.run(
        [sys.executable, "-c", "import lmms_eval"],
        env=os.environ | {"PYTHONPATH": folder},
        capture_output=True,
        check=False,
    )
    if found.returncode:
        pytest.skip("make test-lmms runs this: lmms-eval is not installed")
    metadata = tmp_path_factory.mktemp("metadata")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(metadata)], cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    path = os.pathsep.join([str(metadata), str(ROOT), str(ROOT / "kernels"), folder])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def ask_task(recipe_path: str, runs: str, task: str, out: str) -> None:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.evaluation.benchmarks.locate import parse_requests
    from megatron_eagle.evaluation.benchmarks.run import Wishes, evaluate_benchmarks
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    folder = RunFolder(Path(runs) / recipe.name)
    requests = parse_requests(f"exact={Path(task).name}", Path(task).parent)
    wishes = Wishes(answer_tokens=TOKENS)
    evaluate_benchmarks(recipe, recipe.stages[0], folder, requests, Path(out), install(), wishes)


def test_lmms_eval_gets_the_accuracy_of_evaluate(
    small_run, worlds, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe, runs = str(small_run.write_recipe(tmp_path / "r.yaml")), tmp_path / "runs"
    heldout = small_run.folder / "heldout"
    worlds(1).run(train, recipe, "first", str(runs))
    worlds(1).run(answer, recipe, "first", str(runs), str(heldout), str(tmp_path / "first"), TOKENS)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    made = made_questions(heldout, tmp_path / "first" / "predictions.jsonl")
    task = made_task(tasks / "made.yaml", made_parquet(tasks / "made.parquet", made))
    worlds(1).run(ask_task, recipe, str(runs), str(task), str(tmp_path / "own"))
    own = json.loads((tmp_path / "own" / "scores.json").read_text())["benchmarks"]["exact"]
    assert 0 < own["value"] < 100

    arguments = f"model={runs / 'small'},device=cpu,tokenizer={small_run.folder / 'tokenizer.model'}"
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "megatron_eagle", "--model_args", arguments,
         "--tasks", "eagle_made", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"),
         "--batch_size", "4", "--log_samples"],
        env=environment | {"HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["eagle_made"]
    assert 100 * scores["exact,none"] == pytest.approx(own["value"])
    (logged,) = (tmp_path / "out").rglob("*samples_eagle_made.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in logged.read_text().splitlines()]
    lines = map(json.loads, (tmp_path / "own" / "exact" / "predictions.jsonl").read_text().splitlines())
    assert sorted(said) == sorted(line["prediction"].strip() for line in lines), "lmms-eval strips answers"
