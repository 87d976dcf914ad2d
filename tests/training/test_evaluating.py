"""Evaluation while a stage trains: what it says, what it leaves alone, and which checkpoint it keeps."""

import contextlib
import io
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_files import made_questions, made_tsv
from train_cases import metrics
from worlds import WorldError

from megatron_eagle.config.ending import is_over
from megatron_eagle.config.evaluation import EvaluationSettings
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.errors import UserError

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two replicas, overlapped reduction": ({}, {"overlap": True}, "fp32"),
    "pp, spread, bf16": ({"pp": 2, "encoder": "spread"}, {"overlap": True}, "bf16"),
    "tp, sequence parallel": ({"tp": 2, "sequence_parallel": True}, {}, "fp32"),
    "cp": ({"cp": 2}, {}, "fp32"),
}


def train(recipe_path: str, runs: str, scripted: list[float] | None = None, overrides: tuple[str, ...] = ()) -> int:
    """In every process of a world: the last stage, ``scripted`` scores for asking; what torch would draw next."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.while_training import make_evaluator
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder

    def told(*_: Any) -> Any:
        scores = iter(scripted or [])
        return lambda engine: {"heldout": next(scores), **({"exact": next(scores)} if by_benchmark else {})}

    torch.manual_seed(5)
    recipe, platform = load_recipe(Path(recipe_path), overrides), install()
    stage = recipe.stages[-1]
    by_benchmark = stage.evaluation and stage.evaluation.benchmarks
    groups = initialise(recipe.stage_layout(stage), platform, timeout=timedelta(minutes=1))
    make = make_evaluator if scripted is None else told
    StageRun(recipe, stage, RunFolder(Path(runs) / recipe.name), platform, groups, make_evaluator=make).train()
    return int(torch.randint(1 << 40, ()))


def said(*arguments: Any) -> str:
    """In every process of a world: what ``train`` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        train(*arguments)
    return text.getvalue()


def write(small_run, file: Path, evaluation: dict[str, Any] | None, **changes: Any) -> str:
    """The small recipe with its second stage alone, of four steps."""
    settings = small_run.settings()
    stage = settings["stages"][1] | {"steps": 4, "checkpoint_every": 4, **changes.pop("stage", {})}
    return str(small_run.write_recipe(file, stages=[stage | {"evaluation": evaluation}], **changes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_notice_that_it_is_evaluated(small_run, worlds, tmp_path: Path, layout: str) -> None:
    shape, optimizer, precision = LAYOUTS[layout]
    changes = {"layout": shape, "precision": precision, "optimizer": optimizer, "log": {"tensorboard": layout == "cp"}}
    made_tsv(tmp_path / "exact.tsv", made_questions(small_run.folder / "heldout")[:3])
    benchmarks = {"benchmarks": ["exact"], "benchmark_data": str(tmp_path)}
    asked = {"every": 2, "data": [str(small_run.folder / "heldout")], "limit": 6, "answer_tokens": 3, **benchmarks}
    drawn, lines = {}, {}
    for name, evaluation in (("on", asked), ("off", None)):
        file = write(small_run, tmp_path / f"{name}.yaml", evaluation, **changes)
        drawn[name] = worlds(2).run(train, file, str(tmp_path / name))
        lines[name] = metrics(tmp_path / name)
    numbers = ("loss", "grad_norm", "sample_digest", "tiles", "learning_rate")
    on, off = ([[line[number] for number in numbers] for line in lines[name]] for name in ("on", "off"))
    assert on == off and len(on) == 4 and len({loss for loss, *_ in on}) == 4
    assert drawn["on"] == drawn["off"]
    names = {"heldout", "exact"}
    assert [set(line["scores"]) for line in lines["on"]] == [set(), names, set(), names]
    assert all((line["evaluation_s"] > 0) == bool(line["scores"]) for line in lines["on"])
    assert not any(line["scores"] for line in lines["off"])
    if layout == "cp":
        folder = tmp_path / "on" / "small" / "tensorboard" / "second"
        assert curves(folder, "heldout") == curves(folder, "exact") == [2, 4]


def curves(folder: Path, name: str) -> list[int]:
    """Steps that have that score in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(f"score/{name}")]


def test_the_score_is_what_evaluate_says_of_the_checkpoint(small_run, worlds, tmp_path: Path) -> None:
    """One question, three quarters of whose answers are "yes": what a few steps can learn."""
    answers = ["yes", "yes", "no", "yes"] * 4
    records = [
        {"id": str(number), "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": answer}]}
        for number, answer in enumerate(answers)
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset(tmp_path / "said.jsonl", tmp_path / "said")
    asked = {"every": 20, "data": [str(tmp_path / "said")], "limit": None, "answer_tokens": 4}
    stage = {"steps": 20, "checkpoint_every": 20, "learning_rate": 5e-3, "blend": [{"path": str(tmp_path / "said")}]}
    file = write(small_run, tmp_path / "r.yaml", asked, stage=stage)
    worlds(2).run(train, file, str(tmp_path / "runs"))
    worlds(2).run(evaluate, file, str(tmp_path / "said"), str(tmp_path / "runs"), str(tmp_path / "out"))
    accuracy = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert metrics(tmp_path / "runs")[-1]["scores"] == {"said": accuracy["overall"]}
    assert accuracy["overall"] == 0.75, "a score that nothing moves would prove nothing"


def evaluate(recipe_path: str, data: str, runs: str, out: str) -> None:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.score import evaluate as score
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    score(recipe, recipe.stages[-1], RunFolder(Path(runs) / recipe.name), Path(data), Path(out), install(), 4)


def test_the_best_checkpoint_stays_through_a_resume(small_run, worlds, tmp_path: Path) -> None:
    asked = {"every": 1, "data": ["unread"], "keep": "best"}
    stage = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 1, "async_save": False, "decay": "constant"}
    file, runs = write(small_run, tmp_path / "r.yaml", asked, stage=stage), str(tmp_path / "runs")
    folder = tmp_path / "runs" / "small" / "checkpoints" / "second"

    def left() -> list[str]:
        return sorted(path.name for path in folder.glob("step_*"))

    worlds(1).run(train, file, runs, [0.2, 0.7, 0.3])
    assert left() == ["step_00000002", "step_00000003"]
    worlds(1).run(train, file, runs, [0.6, 0.7], ("stages.second.steps=5",))
    assert left() == ["step_00000002", "step_00000005"], "an equal score is no better"
    worlds(1).run(train, file, runs, [0.8], ("stages.second.steps=6",))
    assert left() == ["step_00000006"]
    worlds(1).run(train, file, runs, None, ("stages.second.steps=7", "stages.second.evaluation=null"))
    assert left() == ["step_00000006", "step_00000007"]
    worlds(1).run(train, file, runs, [0.7], ("stages.second.steps=8",))
    assert left() == ["step_00000006", "step_00000008"], "a start without an evaluation loses nothing"


def test_a_best_by_another_score_is_none_to_compare_with(small_run, worlds, tmp_path: Path) -> None:
    asked = {"every": 1, "data": ["heldout"], "benchmarks": ["exact"], "benchmark_data": "unread", "keep": "best"}
    stage = {"steps": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "async_save": False, "decay": "constant"}
    file, runs = write(small_run, tmp_path / "r.yaml", asked, stage=stage), str(tmp_path / "runs")
    folder = tmp_path / "runs" / "small" / "checkpoints" / "second"
    worlds(1).run(train, file, runs, [0.9, 0.9, 0.1, 0.1])
    best = "stages.second.evaluation.best_by=exact"
    (text,) = worlds(1).run(said, file, runs, [0.9, 0.3, 0.9, 0.2], ("stages.second.steps=4", best))
    noted = json.loads((folder / "best.json").read_text())
    assert noted == {"step": 3, "score": 0.3, "by": "exact"}
    line = "second: the best score so far, 0.9000, is mean of heldout, exact; the recipe goes by exact, the best begins"
    assert line in text


def test_one_rule_says_when_a_stage_is_over() -> None:
    assert [is_over(step, 4, 0, None) for step in (3, 4, 5)] == [False, True, True]
    assert [is_over(3, 4, waited, 2) for waited in (1, 2, 3)] == [False, True, True]
    assert not is_over(3, 4, 9, None)


def test_the_best_by_a_benchmark_is_kept_whatever_the_other_scores_say(small_run, worlds, tmp_path: Path) -> None:
    asked = {"every": 1, "data": ["heldout"], "benchmarks": ["exact"], "benchmark_data": "unread", "keep": "best"}
    stage = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 1, "async_save": False, "decay": "constant"}
    for best_by, best in (("exact", 2), (None, 1)):
        file = write(small_run, tmp_path / "r.yaml", asked | {"best_by": best_by}, stage=stage)
        worlds(1).run(train, file, str(tmp_path / f"{best}"), [0.9, 0.2, 0.1, 0.6, 0.5, 0.5])
        folder = tmp_path / f"{best}" / "small" / "checkpoints" / "second"
        noted = json.loads((folder / "best.json").read_text())
        assert noted["step"] == best and noted["by"] == (best_by or "mean of heldout, exact")


def test_a_stage_whose_score_rises_no_more_is_over(small_run, worlds, tmp_path: Path) -> None:
    """And continues if it is given more patience; what it waited for outlives a restart."""
    from megatron_eagle.checkpoint.files import find_latest, read_description
    from megatron_eagle.cluster import events
    from megatron_eagle.training.run_folder import RunFolder

    asked = {"every": 1, "data": ["unread"], "patience": 2}
    stage = {"steps": 9, "checkpoint_every": 1, "async_save": False}
    file, runs = write(small_run, tmp_path / "r.yaml", asked, stage=stage), str(tmp_path / "runs")
    folder = RunFolder(tmp_path / "runs" / "small")

    def state(patience: int = 2) -> tuple[int, float | None, int, bool]:
        newest = read_description(find_latest(folder.stage_checkpoints("second")))
        return newest.step, newest.best_score, newest.waited, events.is_over(folder.path, "second", 9, patience)

    with pytest.raises(WorldError, match="StopIteration"):  # dies in its fourth evaluation
        worlds(1).run(train, file, runs, [0.5, 0.7, 0.6])
    assert state() == (3, 0.7, 1, False)
    worlds(1).run(train, file, runs, [0.7])
    assert state() == (4, 0.7, 2, True)
    worlds(1).run(train, file, runs, [])  # complete: nothing is asked
    assert [line["step"] for line in metrics(tmp_path / "runs")] == [1, 2, 3, 4]
    recipe = load_recipe(Path(file))
    after = replace(recipe.stages[0], name="third", evaluation=None)
    recipe = replace(recipe, stages=(recipe.stages[0], after))
    assert folder.weights_before(recipe, after).name == "step_00000004"
    without = replace(recipe, stages=(replace(recipe.stages[0], evaluation=None), after))
    with pytest.raises(UserError, match="'second' has reached step 4 of 9; finish it first"):
        folder.weights_before(without, after)
    worlds(1).run(train, file, runs, [0.8, 0.1, 0.1, 0.1], ("stages.second.evaluation.patience=3",))
    assert state(3) == (8, 0.8, 3, True)


def train_watched(
    recipe_path: str, runs: str, scripted: list[float] | None, stop_in: int = 0, trouble: str = ""
) -> tuple[list[str | None], int, str]:
    """In a world of one: (newest checkpoint at each evaluation, how often the watch heard that it goes on, the end).

    stop_in: step in which a stop is asked for. trouble: what happens in the second evaluation and lasts ("superseded")
    or to the second checkpoint ("disk").
    """
    from megatron_eagle.checkpoint import saver
    from megatron_eagle.checkpoint.files import find_latest
    from megatron_eagle.compat.platform import install
    from megatron_eagle.errors import Superseded
    from megatron_eagle.evaluation.while_training import make_evaluator
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.fencing import OwnStart
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder
    from megatron_eagle.training.watchdog import StoppedEarly, Watchdog

    class Watch(Watchdog):
        steps = heard = 0

        @property
        def asked(self) -> bool:
            return self.steps + 1 == stop_in

        def step_done(self) -> None:
            self.steps += 1

        def goes_on(self) -> None:
            self.heard += 1

    def told(*_: Any) -> Any:
        def evaluate(engine: Any) -> dict[str, float]:
            latest = find_latest(stage_folder)
            found.append(latest.name if latest else None)
            return {"heldout": scripted[len(found) - 1]}

        return evaluate

    def require_newest(own: OwnStart) -> None:
        if trouble == "superseded" and len(found) == 2:
            raise Superseded("a newer start")

    def publish(save: Any, *rest: Any) -> None:
        if trouble == "disk" and save.description.step == 2:
            raise OSError(28, "No space left on device")
        published(save, *rest)

    recipe, platform, watch, end = load_recipe(Path(recipe_path)), install(), Watch(), ""
    stage, folder, found = recipe.stages[-1], RunFolder(Path(runs) / recipe.name), []
    stage_folder, published = folder.stage_checkpoints(stage.name), saver.publish
    groups = initialise(recipe.stage_layout(stage), platform, timeout=timedelta(minutes=1))
    make = make_evaluator if scripted is None else told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnStart, "require_newest", require_newest)
        patch.setattr(saver, "publish", publish)
        try:
            StageRun(recipe, stage, folder, platform, groups, watch, make_evaluator=make).train()
        except (StoppedEarly, Superseded) as error:
            end = str(error)
    return found, watch.heard, end


@pytest.mark.parametrize("keep", ["newest", "best"])
def test_a_stop_and_the_last_step_are_saved_before_anything_is_asked(small_run, worlds, tmp_path: Path, keep) -> None:
    asked = {"every": 2, "data": ["unread"], "keep": keep}
    file = write(small_run, tmp_path / "r.yaml", asked, stage={"checkpoint_every": 2, "keep_checkpoints": 1})
    ((found, _, end),) = worlds(1).run(train_watched, file, str(tmp_path / "stopped"), [0.5], 2)
    assert found == [] and end == "second was asked to stop: saved step 2"
    stopped, whole = (tmp_path / name / "small/checkpoints/second" for name in ("stopped", "whole"))
    assert sorted(path.name for path in stopped.iterdir()) == ["latest", "step_00000002"]
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2]
    ((found, _, end),) = worlds(1).run(train_watched, file, str(tmp_path / "whole"), [0.5, 0.6], 4)
    assert found == [None, "step_00000004"] and not end
    assert [line["scores"] for line in metrics(tmp_path / "whole")] == [{}, {"heldout": 0.5}, {}, {"heldout": 0.6}]
    best = ["best.json"] if keep == "best" else []
    assert sorted(path.name for path in whole.iterdir()) == [*best, "latest", "step_00000004"]


def test_the_watch_hears_of_each_batch_of_answers(small_run, worlds, tmp_path: Path) -> None:
    asked = {"every": 4, "data": [str(small_run.folder / "heldout")], "limit": 6, "answer_tokens": 3}
    file = write(small_run, tmp_path / "r.yaml", asked)
    ((_, heard, _),) = worlds(1).run(train_watched, file, str(tmp_path), None)
    assert heard >= 2, "the answers, and the other replicas'"


@pytest.mark.parametrize("trouble, left", [("disk", [1, 3]), ("superseded", [1])])
def test_no_checkpoint_is_the_best_before_it_is_there(small_run, worlds, tmp_path: Path, trouble: str, left) -> None:
    asked = {"every": 1, "data": ["unread"], "keep": "best"}
    stage = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 1, "async_save": False, "decay": "constant"}
    file = write(small_run, tmp_path / "r.yaml", asked, stage=stage)
    worlds(1).run(train_watched, file, str(tmp_path), [0.5, 0.9, 0.3], 0, trouble)
    folder = tmp_path / "small" / "checkpoints" / "second"
    assert sorted(path.name for path in folder.glob("step_*")) == [f"step_{step:08d}" for step in left]
    assert json.loads((folder / "best.json").read_text()) == {"step": 1, "score": 0.5, "by": "unread"}


def test_a_best_checkpoint_of_steps_that_are_trained_again_is_forgotten(tmp_path: Path) -> None:
    from megatron_eagle.checkpoint.best import Best, forget_best_after, note_if_best, read_best

    note_if_best(tmp_path, Best(4, 0.5))
    note_if_best(tmp_path, Best(5, 0.5))
    (tmp_path / "step_00000004").mkdir()
    forget_best_after(tmp_path, 4)
    best = read_best(tmp_path)
    assert best is not None and (best.step, best.score) == (4, 0.5)
    forget_best_after(tmp_path, 3)
    assert read_best(tmp_path) is None
    (tmp_path / "best.json").write_text('{"step": 4')
    with pytest.raises(UserError, match=r"best\.json cannot be read: .* remove it to forget"):
        read_best(tmp_path)


def test_data_that_cannot_be_asked_ends_the_run_before_its_first_step(small_run, worlds, tmp_path: Path) -> None:
    file = write(small_run, tmp_path / "r.yaml", {"every": 2, "data": [str(tmp_path / "nothing")]})
    with pytest.raises(WorldError, match="stage 'second', evaluation: .*nothing"):
        worlds(2).run(train, file, str(tmp_path / "runs"))
    assert not (tmp_path / "runs" / "small" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "settings, layout, message",
    [
        ({}, Layout(pp=2, vpp=2), "without virtual pipeline stages, the layout has vpp=2"),
        ({"answer_tokens": 512}, Layout(), "answer_tokens=512 leaves no room in a pack_length of 512"),
        ({"keep": "best", "every": 3}, Layout(), "every=3 is no multiple of checkpoint_every=2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_recipe(settings, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**{"every": 2, "data": ("a",), **settings}).check(layout, 512, 2)


def test_a_recipe_says_it_in_one_line(small_run, tmp_path: Path) -> None:
    asked = {"every": 2, "data": ["a"]}
    with pytest.raises(UserError, match="stage 'second': evaluation generates answers without virtual pipeline"):
        load_recipe(Path(write(small_run, tmp_path / "r.yaml", asked, layout={"pp": 2, "vpp": 1})))
    for wrong, message in (
        ({"every": 2}, "data and benchmarks are empty"),
        ({"every": 2, "data": []}, "data and benchmarks are empty"),
        ({"every": 2, "data": ["x/a", "y/a"]}, "name a more than once"),
        ({"every": 2, "data": ["x/docvqa"], "benchmarks": ["docvqa=a.tsv"], "benchmark_data": "b"}, "name docvqa more"),
        ({"every": 2, "benchmarks": ["docvqa"]}, "benchmarks and .benchmark_data, .*, belong together"),
        ({"every": 2, "data": ["a"], "benchmark_data": "b"}, "belong together"),
        (
            {"every": 2, "data": ["a"], "best_by": "a"},
            "best_by='a' needs keep: best or patience, and",
        ),
        ({"every": 3, "data": ["a"], "best_by": "b", "keep": "best"}, "one of the scores a"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(Path(write(small_run, tmp_path / "r.yaml", wrong)))
