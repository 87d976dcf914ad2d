"""Training for real: stages, resume, bad samples and bad input, in shared worlds and in processes that are killed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from train_cases import losses, metrics, train, weights

from megatron_eagle.cluster.events import read_events
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError

ROOT = Path(__file__).parents[2]


def test_stage_one_changes_the_connector_and_nothing_else(small_run, worlds, tmp_path: Path) -> None:
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    before = worlds(1).run(weights, recipe, "", "")[0]
    worlds(1).run(train, recipe, "first", str(tmp_path))
    after = worlds(1).run(weights, recipe, "first", str(tmp_path))[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("connector.")}
    assert len(changed) == 6
    steps = metrics(tmp_path)  # saved after steps 3 and 6
    stalled = [entry["step"] for entry in steps if entry["checkpoint_stall_s"] > 0]
    assert (
        stalled and stalled[0] == 4 and stalled[-1] <= 6
    )  # copied before step 4, published behind it or the next ones
    assert all(entry["tflops"] > 0 and entry["mfu"] is None for entry in steps)


def test_later_stages_start_where_the_one_before_ended(small_run, worlds, tmp_path: Path) -> None:
    """A second stage with a learning rate of almost zero keeps the weights of the first."""
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    worlds(1).run(train, recipe, "first", str(tmp_path))
    still = ("stages.second.learning_rate=1e-30", "optimizer.weight_decay=0")
    worlds(1).run(train, recipe, "second", str(tmp_path), still)
    first = worlds(1).run(weights, recipe, "first", str(tmp_path))[0]
    second = worlds(1).run(weights, recipe, "second", str(tmp_path))[0]
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-28) for name in first)


LAYOUTS = [
    pytest.param(("layout.tp=2",), marks=pytest.mark.long, id="layout.tp=2"),
    ("layout.tp=2", "layout.sequence_parallel=true"),
    pytest.param(("layout.pp=2",), marks=pytest.mark.long, id="layout.pp=2"),
    ("layout.pp=2", "stages.second.layout.pp=1", "stages.second.layout.tp=2"),
    (),
]


@pytest.fixture(scope="module")
def one(small_run, worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in one process: the runs' folder, beside its recipe."""
    folder = tmp_path_factory.mktemp("one")
    recipe = str(small_run.write_recipe(folder / "r.yaml"))
    for stage in ("first", "second"):
        worlds(1).run(train, recipe, stage, str(folder / "runs"))
    return folder / "runs"


@pytest.mark.parametrize("overrides", LAYOUTS, ids=" ".join)
def test_two_processes_train_like_one(one: Path, worlds, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Same losses over six steps a stage; dp=2 (none) reads other packs, so there only that it trains is asked here."""
    for stage in ("first", "second"):
        worlds(2).run(train, str(one.parent / "r.yaml"), stage, str(tmp_path), overrides)
    if overrides:
        assert [entry[0::3] for entry in losses(one)] == [entry[0::3] for entry in losses(tmp_path)]
        assert [entry[2] for entry in losses(tmp_path)] == pytest.approx([entry[2] for entry in losses(one)], rel=2e-6)
    else:
        assert len(losses(tmp_path)) == 12


@pytest.mark.parametrize(
    "options",
    [
        {"layout": {"pp": 2}},
        {"optimizer": {"overlap": True}},
        {"reading": {"order": "buffer", "packing_buffer": 16, "shuffle_buffer": 8}},
    ],
    ids=["pp2", "dp2 overlapped", "dp2 buffered"],
)
def test_a_stopped_stage_continues_with_the_same_losses(small_run, worlds, tmp_path: Path, options) -> None:
    """Six steps at once, and three steps followed by three in a process that starts from the checkpoint.

    Overlapped: weights of a step are gathered only while the next forward pass runs, which a save must not miss.
    """
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", **options))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = ("stages.first.decay=constant",)  # the schedule knows the number of steps, which differs here
    worlds(2).run(train, recipe, "first", str(whole), schedule)
    worlds(2).run(train, recipe, "first", str(parts), (*schedule, "stages.first.steps=3"))
    worlds(2).run(train, recipe, "first", str(parts), schedule)
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("resumed", [{"pp": 2}, pytest.param({}, marks=pytest.mark.long), {"tp": 2}], ids=str)
def test_everything_trained_continues_in_any_layout(small_run, worlds, tmp_path: Path, resumed: dict[str, int]) -> None:
    """Three steps at pp=2 with tied embeddings, the rest in another layout; an uninterrupted run is the reference.

    Adam's state is what this is about: megatron-core on its own saves it at the wrong places here, see
    ``_count_padding_as_content``.
    """
    stage = {**small_run.settings()["stages"][1], "decay": "constant"}
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", stages=[stage]))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    worlds(2).run(train, recipe, "second", str(whole), ("layout.pp=2",))
    worlds(2).run(train, recipe, "second", str(parts), ("layout.pp=2", "stages.second.steps=3"))
    overrides = tuple(f"layout.{name}={value}" for name, value in resumed.items())
    worlds(2 if resumed else 1).run(train, recipe, "second", str(parts), overrides)
    assert [entry[3] for entry in losses(parts)] == [entry[3] for entry in losses(whole)]
    tolerance = 0.0 if resumed == {"pp": 2} else 1e-6
    assert [entry[2] for entry in losses(parts)] == pytest.approx([entry[2] for entry in losses(whole)], rel=tolerance)
    norms = [[entry["grad_norm"] for entry in metrics(runs)] for runs in (parts, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=max(tolerance, 1e-5))


def test_a_stage_continues_with_the_same_data_at_another_data_parallel_size(small_run, worlds, tmp_path: Path) -> None:
    """Three steps at dp=2, three at dp=1: the same samples and losses as all six at dp=2."""
    stage = {**small_run.settings()["stages"][1], "decay": "constant"}
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", stages=[stage]))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    worlds(2).run(train, recipe, "second", str(whole))
    worlds(2).run(train, recipe, "second", str(parts), ("stages.second.steps=3",))
    worlds(1).run(train, recipe, "second", str(parts))
    assert [entry[3] for entry in losses(parts)] == [entry[3] for entry in losses(whole)]
    assert [entry[2] for entry in losses(parts)] == pytest.approx([entry[2] for entry in losses(whole)], rel=1e-6)


def test_a_buffered_stream_refuses_another_data_parallel_size(small_run, worlds, tmp_path: Path) -> None:
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    buffered = ("reading.order=buffer", "reading.packing_buffer=16", "reading.shuffle_buffer=8")
    worlds(2).run(train, recipe, "first", str(tmp_path), (*buffered, "stages.first.steps=3"))
    result = run_command("train", recipe, "--stage", "first", "--runs", str(tmp_path), *buffered)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_a_complete_stage_is_left_alone(small_run, worlds, tmp_path: Path) -> None:
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    for _ in range(2):
        worlds(1).run(train, recipe, "first", str(tmp_path))
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def run_command(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "megatron_eagle", *arguments],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False, **options,
    )  # fmt: skip


def start_training(recipe: Path, runs: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "megatron_eagle", "train", str(recipe), "--stage", "first"]
    return subprocess.Popen(
        [*command, "--runs", str(runs), "--processes", "2"],
        start_new_session=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_and_resume(small_run, tmp_path: Path, kills: int, seed: int) -> None:
    """Kill every process at random moments and start the same command again, until the stage is through."""
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml",
        layout={"pp": 2},
        stages=[{**small_run.settings()["stages"][0], "steps": 6 + 4 * kills, "checkpoint_every": 2}],
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_training(recipe, whole).wait(timeout=280) == 0
    chance = random.Random(seed)
    for _ in range(kills):
        process = start_training(recipe, killed)
        at_start = count_lines(killed)
        wanted = at_start + chance.randint(1, 4)
        deadline = time.monotonic() + 90
        while count_lines(killed) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)  # so that some kills land in the middle of a save
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start_training(recipe, killed).wait(timeout=280) == 0
    assert losses(killed) == losses(whole)
    (start,) = [event for event in read_events(whole / "small") if event["event"] == "start_up"]
    parts = ["imports", "meeting", "groups", "checkpoints", "model", "weights", "data", "first step"]
    assert list(start["seconds"]) == [*parts, "all"] and start["processes"] == 2
    assert 1 < start["seconds"]["all"] <= sum(start["seconds"][part] for part in parts) + 0.01


def count_lines(runs: Path) -> int:
    path = runs / "small" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_processes_continue_with_exactly_the_losses_of_an_undisturbed_run(small_run, tmp_path) -> None:
    kill_and_resume(small_run, tmp_path, kills=1, seed=1)


def test_a_lost_process_ends_the_others_with_its_rank_and_the_operation(small_run, tmp_path: Path) -> None:
    """Killed in the middle of a step; nobody may wait for it until the collective's timeout of minutes."""
    stage = {**small_run.settings()["stages"][0], "steps": 100_000, "checkpoint_every": 100_000}
    recipe = small_run.write_recipe(tmp_path / "r.yaml", layout={"pp": 2}, stages=[stage])
    command = [sys.executable, "-m", "megatron_eagle", "train", str(recipe), "--stage", "first", "--processes", "2"]
    process = subprocess.Popen(
        [*command, "--runs", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while count_lines(tmp_path) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    victim = next(worker for worker in workers if worker.environ()["RANK"] == "1")
    victim.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 was ended by SIGKILL" in said
    assert re.search(r"process 0 of 2 lost contact with another one in first, step \d+, [a-z' ]+: ", said), said
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_many_kills(small_run, tmp_path, seed: int) -> None:
    kill_and_resume(small_run, tmp_path, kills=4, seed=100 + seed)


def spoil_images(folder: Path, share: float) -> list[str]:
    """Overwrite the bytes of some images inside the shards; returns how many samples were hit."""
    import tarfile

    chance = random.Random(3)
    spoiled = set()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            images = [member for member in tar.getmembers() if not member.name.endswith(".json")]
        data = bytearray(shard.read_bytes())
        for member in images:
            if chance.random() < share:
                middle = member.offset_data + member.size // 2
                data[middle : member.offset_data + member.size] = bytes(member.size - member.size // 2)
                spoiled.add(member.name.split(".")[0])
        shard.write_bytes(bytes(data))
    return sorted(spoiled)


def test_broken_samples_are_skipped_named_and_counted(small_run, worlds, tmp_path: Path) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(small_run.folder / "train", folder)
    assert spoil_images(folder, share=0.3)
    recipe = small_run.write_recipe(tmp_path / "r.yaml", layout={"pp": 2})
    worlds(2).run(train, str(recipe), "first", str(tmp_path), (f"stages.first.blend=[{{path: {folder}}}]",))
    entries = metrics(tmp_path)
    assert len(entries) == 6
    rejected = [item for entry in entries for item in entry["rejected"]]
    assert rejected and entries[-1]["rejected_total"] == len(rejected)
    assert all(re.match(r"broad-\d+", identity) and reason for identity, reason in rejected)


def test_packs_without_any_tile_train(small_run, worlds, tmp_path: Path) -> None:
    from megatron_eagle.data.build.dataset import build_dataset

    lines = [
        {
            "id": f"t{number}",
            "conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": f"a {number}"}],
        }
        for number in range(40)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_dataset(tmp_path / "text.jsonl", tmp_path / "text")
    for layout in ({"pp": 2}, {"tp": 2}):
        runs = tmp_path / "-".join(layout)
        recipe = small_run.write_recipe(tmp_path / "r.yaml", layout=layout, optimizer={"overlap": True})
        blend = f"stages.second.blend=[{{path: {tmp_path / 'text'}}}]"
        worlds(2).run(train, str(recipe), "first", str(runs))
        worlds(2).run(train, str(recipe), "second", str(runs), (blend,))
        second = [entry for entry in metrics(runs) if entry["stage"] == "second"]
        assert {entry["tiles"] for entry in second} == {0}
        assert second[-1]["loss"] < second[0]["loss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layout.tp=3"], "tp=3 does not divide 4 attention heads"),
        (["--stage", "stage7"], "stage 'stage7' does not exist; the recipe has first, second"),
        (["--stage", "second"], "stage 'second' starts from 'first', which has no checkpoint"),
        (["tokenizer.path=nowhere.model"], "nowhere.model"),
        (["stages.first.blend.0.path=nowhere"], "nowhere"),
        (["--runs", "/proc/nothing"], "cannot write"),
        pytest.param(["--processes", "2", "layout.pp=2", "stages.first.batch=3"], None, marks=pytest.mark.long),
        (["--processes", "2", "stages.first.batch=3"], "batch=3 packs cannot be shared out evenly to 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_no_traceback(
    small_run, tmp_path: Path, arguments: list[str], words: str | None
) -> None:
    recipe = small_run.write_recipe(tmp_path / "r.yaml")
    options = ["train", str(recipe), "--stage", "first", "--runs", str(tmp_path), "stages.first.steps=1", *arguments]
    result = run_command(*options)
    if words is None:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and words in lines[0], result.stderr


def test_a_checkpoint_of_another_model_is_refused(small_run, worlds, tmp_path: Path) -> None:
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    worlds(1).run(train, recipe, "first", str(tmp_path))
    result = run_command(
        "train", recipe, "--stage", "second", "--runs", str(tmp_path), "model.language.intermediate_size=96"
    )
    assert result.returncode == 2
    assert "holds another model: language.intermediate_size is 64 there, 96 in the recipe" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_recipe_that_spells_out_defaults_is_the_same_model(small_run, worlds, tmp_path: Path) -> None:
    brief, spelt_out = small_run.settings()["model"], small_run.settings()["model"]
    spelt_out["encoders"][0]["layer_norm_eps"] = 1e-6
    spelt_out["language"]["rms_norm_eps"] = 1e-6
    one = str(small_run.write_recipe(tmp_path / "one.yaml", model=brief))
    other = str(small_run.write_recipe(tmp_path / "other.yaml", model=spelt_out))
    worlds(1).run(train, one, "first", str(tmp_path), ("stages.first.steps=2",))
    worlds(1).run(train, other, "second", str(tmp_path), ("stages.second.steps=1",))
    assert [entry["stage"] for entry in metrics(tmp_path)] == ["first", "first", "second"]


def test_saving_beside_training_changes_nothing_and_its_stall_is_logged(small_run, worlds, tmp_path: Path) -> None:
    beside, waiting = tmp_path / "beside", tmp_path / "waiting"
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", layout={"pp": 2}))
    often = ("stages.second.checkpoint_every=1", "stages.second.keep_checkpoints=9")
    worlds(1).run(train, recipe, "first", str(beside), ("layout.pp=1",))
    shutil.copytree(beside, waiting)
    worlds(2).run(train, recipe, "second", str(beside), often)
    worlds(2).run(train, recipe, "second", str(waiting), (*often, "stages.second.async_save=false"))
    assert losses(beside) == losses(waiting)
    for runs in (beside, waiting):
        stalls = [entry["checkpoint_stall_s"] for entry in metrics(runs) if entry["stage"] == "second"]
        assert stalls[0] == 0 and all(0 < stall < 30 for stall in stalls[1:])
    folders = [runs / "small" / "checkpoints" / "second" for runs in (beside, waiting)]
    for step in range(1, 7):
        one, other = (TorchDist(folder / f"step_{step:08d}") for folder in folders)
        assert one.names == other.names
        assert all(torch.equal(one.read(name), other.read(name)) for name in ("connector.linear_fc1.weight",))


def train_until_a_signal(recipe_path: str, runs: str) -> str:
    """Rank 1 alone gets the signal, amid saves of every step; returns what the run says at its end."""
    import threading
    from datetime import timedelta

    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder
    from megatron_eagle.training.watchdog import StoppedEarly, Watchdog

    recipe, platform, watch = load_recipe(Path(recipe_path)), install(), Watchdog()
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    watch.stop_on(signal.SIGUSR1)

    def ask() -> None:
        while count_lines(Path(runs)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    if groups.rank == 1:
        threading.Thread(target=ask, daemon=True).start()
    try:
        StageRun(recipe, recipe.stage("first"), RunFolder(Path(runs) / recipe.name), platform, groups, watch).train()
    except StoppedEarly as stopped:
        return str(stopped)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    return "went through"


def test_a_signal_leaves_a_whole_checkpoint_of_the_last_step(small_run, worlds, tmp_path: Path) -> None:
    from megatron_eagle.checkpoint import checksums
    from megatron_eagle.checkpoint.files import find_latest, read_description

    stage = {**small_run.settings()["stages"][0], "steps": 100_000, "checkpoint_every": 1}
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", layout={"pp": 2}, stages=[stage]))
    said = worlds(2).run(train_until_a_signal, recipe, str(tmp_path))
    steps = count_lines(tmp_path)
    assert said == [f"first was asked to stop: saved step {steps}"] * 2 and steps >= 3
    folder = tmp_path / "small" / "checkpoints" / "first"
    latest = find_latest(folder)
    checksums.verify(latest)
    assert read_description(latest).step == steps and not list(folder.glob("*.partial"))


def test_damaged_checkpoint_description_is_named(tmp_path: Path) -> None:
    from megatron_eagle.checkpoint.files import read_description

    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="not a checkpoint of megatron-eagle"):
        read_description(tmp_path)
