"""The engine: the same bytes whatever happens, every sample accounted for, output that ``data build`` reads."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from planted import write_planted

from megatron_eagle.cli import main
from megatron_eagle.curation import decisions, engine, output, processes
from megatron_eagle.curation.block import READ, Result, Segment, _Work, segments
from megatron_eagle.curation.decisions import decided_of, decision_folder, source_decisions, write_decisions
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.operator import Resources, Step, Verdict, make_operator
from megatron_eagle.curation.output import SourceSummary, Summary
from megatron_eagle.curation.plan import Plan, load_plan
from megatron_eagle.curation.processes import processes_for
from megatron_eagle.curation.ray_cluster import BlockWorker
from megatron_eagle.curation.report import SHOWN, Example, _chosen
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.data.build import dataset
from megatron_eagle.data.build.sources import RecordSource
from megatron_eagle.data.sample.conversation import Conversation, parse_record
from megatron_eagle.demo.dataset import generate
from megatron_eagle.errors import UserError

RULES = (
    "turn_order", "empty", "refusal", "repetition", "decimals", "choices", "yes_no", "counting", "leak", "image_size",
    "decorations", "formats", "image_hashes", "duplicates", "lint",
)  # fmt: skip
SEGMENTS = 3  # up to duplicates, up to lint, and the rest
PROCESS = """
import sys
from pathlib import Path
from megatron_eagle.curation.block import segments
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.operator import Resources
from megatron_eagle.curation.plan import load_plan
if __name__ == "__main__":
    curate(load_plan(Path(sys.argv[1])), Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    write_planted(folder, 300, seed=5)
    return folder


def plan_file(folder: Path, planted: Path, **changes: Any) -> Path:
    raw = {
        "name": "test",
        "block": 40,
        "sources": [{"name": "all", "path": str(planted / "samples.jsonl")}],
        "operators": [{"use": name} for name in RULES],
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def made(folder: Path, planted: Path, **changes: Any) -> Plan:
    return load_plan(plan_file(folder, planted, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    curate(made(out.parent, planted), out)
    return out


def test_every_sample_is_used_rejected_or_left(whole: Path, planted: Path) -> None:
    (source,) = json.loads((whole / "summary.json").read_text())["sources"]
    assert source["read"] == 300 == source["used"] + source["rejected"] + source["left"]
    assert source["left"] > 0 and any(note.startswith("tasks: ") for note in source["notes"])
    assert 0 < source["rejected"] < 120
    rows = pq.read_table(whole / "ledger.parquet").to_pylist()
    final = Counter(row["sample"] for row in rows if row["final"])
    assert set(final.values()) == {1} and len(final) == 300
    lines = (whole / "kept" / "all" / "samples.jsonl").read_text().splitlines()
    kept = [json.loads(line)["id"] for line in lines]
    assert kept == [row["sample"] for row in rows if row["final"] and row["decision"] == "kept"]
    assert len(kept) == source["used"]


def conversations(path: Path) -> list[Conversation]:
    items = RecordSource(path).items(path.parent)
    return [item.content for item in items if isinstance(item.content, Conversation)]


def test_what_is_kept_is_read_as_it_was(whole: Path, planted: Path) -> None:
    before = {one.id: one for one in conversations(planted / "samples.jsonl")}
    touched = {row["sample"] for row in pq.read_table(whole / "ledger.parquet").to_pylist() if not row["final"]}
    kept = [one for one in conversations(whole / "kept" / "all" / "samples.jsonl") if one.id not in touched]
    assert len(kept) > 100
    for conversation in kept:
        old = before[conversation.id]
        assert conversation.turns == old.turns
        assert conversation.images == tuple(f"media/{name}" for name in old.images)


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(whole: Path, planted: Path, tmp_path: Path) -> None:
    curate(made(tmp_path, planted), tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == contents(whole)


def killed_run(tmp_path: Path, plan: Path, workers: int, rng: random.Random) -> int:
    """Starts the same run until one comes to its end, killing it at random, alone or with its group; how often."""
    out, kills = tmp_path / "out", 0
    while not out.exists():
        state = tmp_path / ".out.partial" / ".state"
        done = len(list(state.glob("segment-*"))) + rng.randint(0, 8)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PROCESS, str(plan), str(out), str(workers)]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and len(list(state.glob("segment-*"))) < done:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        if process.poll() is None:
            rng.choice((os.kill, os.killpg))(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    return kills


@pytest.mark.slow
def test_a_kill_loses_nothing(whole: Path, planted: Path, tmp_path: Path) -> None:
    assert killed_run(tmp_path, plan_file(tmp_path, planted), 1, random.Random(1)) >= 3
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_kills_lose_nothing(whole: Path, planted: Path, tmp_path: Path) -> None:
    kills, rng = 0, random.Random(2)
    while kills < 50:
        folder = tmp_path / str(kills)
        folder.mkdir()
        kills += killed_run(folder, plan_file(folder, planted), 2, rng)
        assert contents(folder / "out") == contents(whole)


def test_finished_blocks_are_not_done_again(whole: Path, planted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    done: list[int] = []
    real = processes.run_block

    def run_block(plan: Plan, segment: Any, job: Any, state: Path) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.block)
        real(plan, segment, job, state)

    monkeypatch.setattr(processes, "run_block", run_block)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            curate(made(tmp_path, planted), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert done == [0, 1, 2]
    monkeypatch.setattr(processes, "run_block", lambda *given: (done.append(given[2].block), real(*given)))
    curate(made(tmp_path, planted), tmp_path / "out")
    assert done == list(range(8)) * SEGMENTS
    assert contents(tmp_path / "out") == contents(whole)


def test_a_kill_while_the_output_is_written_loses_nothing(
    whole: Path, planted: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(output, "write_report", stopped)
        with pytest.raises(KeyboardInterrupt):
            curate(made(tmp_path, planted), tmp_path / "out")
    curate(made(tmp_path, planted), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_kill_before_the_output_is_moved_loses_nothing(
    whole: Path, planted: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real, out = os.replace, tmp_path / "out"

    def replace(source: Any, target: Any) -> None:
        if Path(target) == out:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(engine.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            curate(made(tmp_path, planted), out)
    other = made(tmp_path, planted, operators=[{"use": "decimals", "most": 1}])
    assert "unfinished run of something else" in refusal(lambda: curate(other, out))
    monkeypatch.setattr(processes, "run_block", stop)
    monkeypatch.setattr(output, "write_report", stop)
    summary = curate(made(tmp_path, planted), out)
    assert contents(out) == contents(whole) and json.loads(json.dumps(asdict(summary))) == json.loads(
        (out / "summary.json").read_text()
    )
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_kill_while_the_state_is_deleted_leaves_nothing_that_a_later_run_takes_for_its_own(
    whole: Path, planted: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real, out = shutil.rmtree, tmp_path / "out"

    def half(folder: Path) -> None:
        for gone in [folder / "begun.json", *folder.glob("read-*"), *sorted(folder.glob("segment-*"))[::2]]:
            gone.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            curate(made(tmp_path, planted, operators=[{"use": "decimals"}]), out)
    assert (out / "summary.json").exists()
    real(out)
    curate(made(tmp_path, planted), out)
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_shards_that_are_built_are_not_built_again(planted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    built: list[str] = []

    def build_dataset(kept: Path, out: Path, **_: Any) -> None:
        if built == ["a"]:
            built.append("killed")
            raise KeyboardInterrupt
        built.append(out.name)
        out.mkdir()

    monkeypatch.setattr(dataset, "build_dataset", build_dataset)
    sources = [{"name": name, "path": str(planted / "samples.jsonl")} for name in "ab"]
    plan = made(tmp_path, planted, sources=sources, operators=[{"use": "turn_order"}])
    with pytest.raises(KeyboardInterrupt):
        curate(plan, tmp_path / "out", build=True)
    curate(plan, tmp_path / "out", build=True)
    assert built == ["a", "killed", "b"]
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == ["a", "b"]


def test_the_report_is_given_a_few_examples_of_each_reason(planted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    given: list[Example] = []
    monkeypatch.setattr(output, "write_report", lambda *arguments: given.extend(arguments[3]))
    sources = [{"name": name, "path": str(planted / "samples.jsonl")} for name in "ab"]
    curate(made(tmp_path, planted, sources=sources), tmp_path / "out")
    shown = Counter((one.source, one.operator, one.decision, one.reason) for one in given)
    assert max(shown.values()) == SHOWN and {source for source, *_ in shown} == {"a", "b"}


def test_explain_says_all_of_a_sample(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pq.read_table(whole / "ledger.parquet").to_pylist()
    row = next(row for row in rows if row["operator"] == "decimals")
    with pytest.raises(SystemExit) as end:
        main(["curate", "explain", str(whole), row["sample"]])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "rejected by decimals: a number has too many decimals" in printed and f"turn {row['turn']}" in printed
    with pytest.raises(SystemExit) as end:
        main(["curate", "explain", str(whole), "planted-000"])
    assert end.value.code == 2
    assert "did you mean planted-00" in capsys.readouterr().err


def test_what_is_shown_is_ranked_by_the_first_score() -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}]
    sample = Sample("a", "c", 0, parse_record({"id": "x", "conversations": turns}), ())
    scores = {"similarity": 0.5, "image": 0.5, "text": 1.0}
    found = Finding("noted", "best match", scores=scores, beside=(), gallery="one")
    result = Result()
    _Work(Segment(0, None, (), None), "a", result, {})._show(sample, found, "similarity")
    assert [(one["rank"], one["gallery"]) for one in result.examples] == [(0.5, "one")]
    plan = Plan("p", ({"name": "a", "path": "x"},), ())  # type: ignore[arg-type]
    summary = Summary("p", (SourceSummary("a", "c", 3, 3, 0, 0, {}, {}),))
    examples = [Example(source="a", **{**result.examples[0], "operator": READ, "gallery": one}) for one in "xyx"]
    groups = _chosen([READ, *(step.operator.name for step in plan.steps)], summary, examples)
    assert [(group.gallery, group.samples) for group in groups] == [("x", 2), ("y", 1)]


def test_a_decision_is_read_once_for_all_sources(tmp_path: Path, monkeypatch: Any) -> None:
    said = [Verdict((name, None), Finding("noted", "r", detail)) for name, detail in (("a", "d"), ("b", "e"))]
    write_decisions(decision_folder(tmp_path, 0), said, block=2)
    step = Step(make_operator("duplicates", {}), frozenset(), "exchange")
    notes = output._notes(tmp_path, [Segment(0, None, (), step), Segment(1, step, (), None)])
    assert {name: [text for text, _ in own] for name, own in notes.items()} == {"a": ["r: d"], "b": ["r: e"]}
    assert notes["c"] == []


def test_decisions_come_back_by_block_however_many_are_held(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(decisions, "HELD", 3)
    keys = [("a", 5), ("b", 0), ("a", 1), ("a", 5), ("a", 4), ("b", 0), ("a", 0)]
    said = [Verdict(key, Finding("noted", "é", str(number))) for number, key in enumerate(keys)]
    write_decisions(tmp_path / "d", said, block=2)
    found = {block: decided_of(tmp_path / "d", "a", block) for block in range(4)}
    details = {block: {key: [one.detail for one in own] for key, own in of.items()} for block, of in found.items()}
    assert details == {0: {1: ["2"], 0: ["6"]}, 1: {}, 2: {5: ["0", "3"], 4: ["4"]}, 3: {}}
    assert [one.detail for one in decided_of(tmp_path / "d", "b", 0)[0]] == ["1", "5"]
    (tmp_path / "e.partial" / "a").mkdir(parents=True)
    (tmp_path / "e.partial" / "a" / "000000.jsonl").write_text("of a process that was killed\n")
    write_decisions(tmp_path / "e", said[:1], block=2)
    assert decided_of(tmp_path / "e", "a", 0) == {} and not (tmp_path / "e.partial").exists()


def test_a_source_may_have_the_name_of_a_file_of_decisions(tmp_path: Path) -> None:
    said = [
        Verdict(("sources.json", 0), Finding("noted", "0")),
        Verdict(("sources.json", None), Finding("noted", "all")),
    ]
    write_decisions(tmp_path / "d", said, block=2)
    assert decided_of(tmp_path / "d", "sources.json", 0)[0] == [Finding("noted", "0")]
    assert [name for name, _ in source_decisions(tmp_path / "d")] == ["sources.json"]


def test_the_report_shows_pictures_and_reasons(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and "a number has too many decimals" in page and "300 samples read" in page


@pytest.mark.slow
def test_a_built_data_set_is_a_source(planted: Path, tmp_path: Path) -> None:
    """JSONL -> shards -> curated -> shards: the media come out of the tars, and nothing else changes."""
    clean = {"operators": [{"use": "turn_order"}, {"use": "image_size"}]}
    first = curate(made(tmp_path, planted, **clean), tmp_path / "first", build=True)
    built = tmp_path / "first" / "shards" / "all"
    again = made(tmp_path, planted, sources=[{"name": "built", "path": str(built)}], **clean)
    second = curate(again, tmp_path / "second")
    assert second.total("used") == second.total("read") == first.total("used")
    folders = (tmp_path / "first/kept/all", tmp_path / "second/kept/built")
    before, after = ([one.turns for one in conversations(folder / "samples.jsonl")] for folder in folders)
    assert before == after
    assert list((tmp_path / "second/kept/built/unpacked").iterdir())
    blend = yaml.safe_load((tmp_path / "first" / "blend.yaml").read_text())["blend"]
    assert blend == [{"path": "shards/all", "weight": float(first.total("used"))}]


def test_the_example_runs(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("general", "charts"):
        generate(tmp_path / "data" / name, split="train", samples=12, seed=1)
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[2] / "examples" / "curation" / "plan.yaml"
    summary = curate(load_plan(example), Path("curated"))
    # The second source is the first again, which the plan finds out.
    assert [(one.read, one.used, one.left) for one in summary.sources] == [(12, 12, 0), (12, 0, 12)]
    assert yaml.safe_load((tmp_path / "curated" / "blend.yaml").read_text())["blend"] == [
        {"path": "shards/general", "weight": 12.0}
    ]


def test_the_example_on_planted_faults_runs(tmp_path: Path, monkeypatch: Any) -> None:
    planted = write_planted(tmp_path / "planted", 200, seed=1)
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[2] / "examples" / "curation" / "planted.yaml"
    (source,) = curate(load_plan(example), Path("curated")).sources
    touched = {
        row["sample"] for row in pq.read_table("curated/ledger.parquet").to_pylist() if row["decision"] == "rejected"
    }
    faulty = {name for name, kind in planted.items() if kind is not None}
    assert source.read == 200 and len(faulty) > 40
    assert len(faulty - touched) <= 2 and len(touched - faulty) <= 2


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "curation.md").read_text().split("```\n")[1].splitlines()
    (program,) = (shlex.split(line)[2] for line in lines if line.startswith("python -c "))
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("megatron-eagle ")]
    assert [words[1] for words in commands] == ["../examples/curation/plan.yaml", "explain", "operators"]
    (tmp_path / "examples").symlink_to(root / "examples", target_is_directory=True)
    (tmp_path / "try").mkdir()
    monkeypatch.chdir(tmp_path / "try")
    exec(program, {})
    for words in commands:
        with pytest.raises(SystemExit) as end:
            main([word for word in words if word not in ("--build", "--workers", "2")])  # other tests do
        assert end.value.code == 0, capsys.readouterr().err
    assert "general: 60 read" in capsys.readouterr().out


def refusal(run: Any) -> str:
    with pytest.raises(UserError) as refused:
        run()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operator": []}, "operator: no such key; did you mean operators?"),
        ({"block": 0}, "block: a whole number of at least 1 is wanted (got 0)"),
        ({"operators": [{"use": "decimal"}]}, "operators.0: operator 'decimal' does not exist"),
        ({"operators": [{"use": "decimals", "mots": 3}]}, "operators.0.mots: no such key; did you mean most?"),
        ({"operators": [{"use": "decimals", "most": "3"}]}, "operators.0.most: a whole number of at least 0 is wanted"),
        ({"operators": [{"most": 3}]}, "operators.0: an operator needs its name under 'use', got the keys most"),
        ({"operators": [{"use": "empty"}, {"use": "empty"}]}, "operators.1: operator 'empty' is given twice"),
        ({"operators": [{"use": "empty", "sources": ["al"]}]}, "source 'al' does not exist; there are all"),
        ({"operators": [{"use": "empty", "reject": "turn"}]}, "one of exchange, sample is wanted (got 'turn')"),
        ({"sources": []}, "the plan has no sources"),
        ({"sources": [{"name": "a", "path": "x"}] * 2}, "names of sources must differ, got a, a"),
        ({"sources": [{"name": "a", "pth": "x"}]}, "sources.a.pth: no such key; did you mean path?"),
    ],
)
def test_a_wrong_plan_is_refused_in_a_line(changes: dict[str, Any], said: str, planted: Path, tmp_path: Path) -> None:
    assert said in refusal(lambda: made(tmp_path, planted, **changes))


def test_what_is_not_there_is_refused_in_a_line(planted: Path, tmp_path: Path) -> None:
    lost = made(tmp_path, planted, sources=[{"name": "a", "path": str(tmp_path / "no.jsonl")}])
    assert "no.jsonl" in refusal(lambda: curate(lost, tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "already exists and is not empty" in refusal(lambda: curate(made(tmp_path, planted), tmp_path / "full"))
    unknown = made(tmp_path, planted, operators=[{"use": "language", "languages": ["english"]}])
    assert "language 'english' is not known; there are" in refusal(lambda: curate(unknown, tmp_path / "other"))


def test_an_unfinished_run_of_another_plan_is_refused(planted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "run_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        curate(made(tmp_path, planted), tmp_path / "out")
    other = made(tmp_path, planted, operators=[{"use": "decimals", "most": 1}])
    assert "holds an unfinished run of something else (plan, settings changed)" in refusal(
        lambda: curate(other, tmp_path / "out")
    )


def test_operators_that_take_up_something_else_are_a_segment_of_their_own(planted: Path, tmp_path: Path) -> None:
    names = ("turn_order", "empty", "leak", "image_hashes", "duplicates", "lint")
    plan = made(tmp_path, planted, operators=[{"use": name} for name in names])
    gpu = Resources(cpus=2, gpus=0.5)
    kinds = {step.operator.name: type(step.operator) for step in plan.steps}
    with pytest.MonkeyPatch.context() as patched:
        for name in ("empty", "lint"):
            patched.setattr(kinds[name], "resources", gpu)
        found = [
            ([step.operator.name for step in one.steps], one.asks and one.asks.operator.name, one.resources)
            for one in segments(plan)
        ]
    one_cpu = Resources()
    assert found == [
        (["turn_order"], None, one_cpu),
        (["empty"], None, gpu),
        (["leak", "image_hashes"], "duplicates", one_cpu),
        ([], None, one_cpu),
        ([], "lint", gpu),
        ([], None, gpu),
    ]


@pytest.mark.slow
def test_a_plan_that_is_divided_by_resources_writes_the_same_bytes(
    whole: Path, planted: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    plan = made(tmp_path, planted)
    kinds = {step.operator.name: type(step.operator) for step in plan.steps}
    monkeypatch.setattr(kinds["decimals"], "resources", Resources(cpus=2))
    monkeypatch.setattr(kinds["image_hashes"], "resources", Resources(gpus=1))
    assert len(segments(plan)) == SEGMENTS + 4
    curate(plan, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("cpus", "gpus", "processes"), [(1, 0, 8), (4, 0, 2), (16, 0, 1), (0, 0, 8), (1, 1, 1), (1, 0.25, 4), (4, 0.25, 2)]
)
def test_processes_share_the_cpus_and_the_first_gpu(cpus: float, gpus: float, processes: int) -> None:
    assert processes_for(Resources(cpus, gpus), workers=8) == processes


def test_what_ray_needs_is_one_line(planted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    plan = made(tmp_path, planted)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "needs the package ray" in refusal(lambda: curate(plan, tmp_path / "out", engine="ray"))
    with pytest.raises(SystemExit) as end:
        main(["curate", str(tmp_path / "plan.yaml"), str(tmp_path / "out"), "--ray-address", "auto"])
    assert end.value.code == 2
    stopped: list[str] = []
    options = {"is_initialized": lambda: False, "init": lambda **_: None, "shutdown": lambda: stopped.append("it")}
    nodes = [{"Alive": True, "Resources": {"CPU": 0.5}}]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**options, nodes=lambda: nodes))
    said = refusal(lambda: curate(plan, tmp_path / "out", engine="ray"))
    assert "takes up 1 CPUs and 0 GPUs, which no machine" in said and stopped == ["it"], (
        "what it has started is stopped"
    )
    worker = BlockWorker(plan, tmp_path, Path("/not/there"))
    assert "does not see /not/there: all machines of a Ray cluster need the same paths" in refusal(worker.begin)
