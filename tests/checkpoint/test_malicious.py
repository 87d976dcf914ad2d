"""Nothing of a checkpoint runs as code: every file of one, replaced by code, is refused by name by whoever reads it."""

import os
import pickle
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_eagle.checkpoint import checksums, safe_index
from megatron_eagle.checkpoint.files import LATEST, find_latest
from megatron_eagle.checkpoint.safe_index import METADATA
from megatron_eagle.compat.checkpoint_index import StorageInfo
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.conversion.check import check
from megatron_eagle.conversion.convert import Options, megatron_to_hf
from megatron_eagle.errors import UserError

BUFFER = {"reading": {"packing_buffer": 16, "shuffle_buffer": 8, "order": "buffer"}}
SAVED = "stages.first.steps=2"
LONGER = "stages.first.steps=3"
EXTRA_STATE = "language.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"


class MakesFolder:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def train(recipe_path: str, stage: str, runs: str, overrides: tuple[str, ...]) -> None:
    """In every process of a world: train a stage, or on from its newest checkpoint."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder

    recipe, platform = load_recipe(Path(recipe_path), overrides), install()
    chosen = recipe.stage(stage)
    groups = initialise(recipe.stage_layout(chosen), platform, timeout=timedelta(minutes=1))
    StageRun(recipe, chosen, RunFolder(Path(runs) / recipe.name), platform, groups).train()


@pytest.fixture(scope="module")
def saved(small_run, worlds, tmp_path_factory) -> Path:
    """A folder with a recipe and the first stage's checkpoint of two processes and a buffered stream."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = small_run.write_recipe(folder / "recipe.yaml", layout={"pp": 2}, **BUFFER)
    worlds(2).run(train, str(recipe), "first", str(folder / "runs"), (SAVED,))
    return folder


# Every file of the checkpoint, and whether code can also come as a file of torch.save.
FILES = {
    "__0_0.distcp": True,
    "__1_0.distcp": True,
    ".metadata": False,
    "common.pt": True,
    "metadata.json": False,
    "checkpoint.json": False,
    "checksums.json": False,
    "position_00000.pt": True,
    "process_00000.pt": True,
    "process_00001.pt": True,
}
CASES = [(name, "pickle") for name in FILES] + [
    pytest.param(name, "archive", marks=() if name == "common.pt" else pytest.mark.long)
    for name, archive in FILES.items()
    if archive
]
CONVERSIONS = ("convert", "compare")  # which one process does


def copy(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    runs = Path(shutil.copytree(saved / "runs", tmp_path / "runs"))
    checkpoint = find_latest(runs / "small" / "checkpoints" / "first")
    assert checkpoint is not None and {file.name for file in checkpoint.iterdir()} == {*FILES, "tokenizer"}
    return runs, checkpoint


def write_code(file: Path, form: str, ran: Path) -> None:
    if form == "pickle":
        file.write_bytes(pickle.dumps(MakesFolder(ran)))
    else:
        torch.save(MakesFolder(ran), file)


def point_to(checkpoint: Path, where: MetadataIndex, file: Path) -> None:
    """Make the index say that ``where`` is in ``file``."""
    index = pickle.loads((checkpoint / METADATA).read_bytes())
    index.state_dict_metadata.setdefault(where.fqn, BytesStorageMetadata())
    index.storage_data[where] = StorageInfo(file.name, 0, file.stat().st_size)
    (checkpoint / METADATA).write_bytes(pickle.dumps(index))
    write_checksums(checkpoint)


def write_checksums(checkpoint: Path) -> None:
    """As whoever has put code into the checkpoint would."""
    files = [file for file in checkpoint.iterdir() if file.is_file() and file.name != checksums.CHECKSUMS]
    checksums.write(checkpoint, checksums.measure(files))


def read_in_every_way(recipe: str, runs: str, data: str, layout: str) -> dict[str, str]:
    """In every process of a world: what is made of the checkpoint of stage ``first`` by all that reads one."""
    from megatron.core import parallel_state

    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.run_folder import RunFolder

    run = RunFolder(Path(runs) / "small")
    stage, tokenizer = run.stage_checkpoints("first"), Path(data).parent / "tokenizer.model"
    settings = load_recipe(Path(recipe), (SAVED, layout))
    ways = {
        "convert": lambda: megatron_to_hf(stage, run.path / "hf", Options(logits=False), tokenizer=tokenizer),
        "compare": lambda: check(stage, stage),
        "next stage": lambda: train(recipe, "second", runs, (SAVED, layout, "stages.second.steps=1")),
        "resume": lambda: train(recipe, "first", runs, (LONGER, layout)),
        # Last, because it leaves the world when it is done.
        "evaluate": lambda: evaluate(settings, settings.stage("first"), run, Path(data), run.path, install(), 2),
    }
    answers = {}
    for name, read in ways.items():
        if name in CONVERSIONS and torch.distributed.get_world_size() > 1:
            continue
        try:
            read()
            answers[name] = "read"
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        parallel_state.destroy_model_parallel()
    return answers


@pytest.fixture
def read(small_run, worlds, saved):
    """Read the checkpoint below a folder in every way; the answers of the first process."""

    def in_a_world(runs: Path, processes: int = 1) -> dict[str, str]:
        layout = f"layout.pp={processes}"
        arguments = (str(saved / "recipe.yaml"), str(runs), str(small_run.folder / "heldout"), layout)
        answers = worlds(processes).run(read_in_every_way, *arguments, timeout=300.0)
        assert all(answer.keys() == answers[0].keys() for answer in answers)
        return {name: " ".join({answer[name]: "" for answer in answers}) for name in answers[0]}

    return in_a_world


def assert_refused(answers: dict[str, str], name: str) -> None:
    kinds = ("UserError: ", "Damaged: ")  # the second is a kind of the first
    assert {way: text for way, text in answers.items() if not text.startswith(kinds) or name not in text} == {}


def test_every_way_reads_what_was_saved(saved, tmp_path, read):
    runs, _ = copy(saved, tmp_path)
    assert set(read(runs).values()) == {"read"}


@pytest.mark.parametrize(("name", "form"), CASES)
def test_code_in_any_file_is_refused_by_whoever_reads_it(saved, tmp_path, read, name, form):
    runs, checkpoint = copy(saved, tmp_path)
    ran = tmp_path / "ran"
    write_code(checkpoint / name, form, ran)
    if name != checksums.CHECKSUMS:
        write_checksums(checkpoint)
    answers = read(runs)
    assert not ran.exists()
    if name == checksums.CHECKSUMS:  # conversions have digests of their own
        assert {way: answers.pop(way) for way in CONVERSIONS} == dict.fromkeys(CONVERSIONS, "read")
    assert_refused(answers, name)


@pytest.mark.parametrize("name", ["process_00001.pt", "__1_0.distcp"])
def test_code_in_the_file_of_one_process_stops_all(saved, tmp_path, read, name):
    runs, checkpoint = copy(saved, tmp_path)
    write_code(checkpoint / name, "archive", tmp_path / "ran")
    write_checksums(checkpoint)
    assert_refused(read(runs, 2), name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["connector.linear_fc1.weight", "optimizer.", "_extra_state"])
def test_code_in_the_place_of_one_tensor_is_refused(saved, tmp_path, read, key):
    """The index is in order and points to the code."""
    runs, checkpoint = copy(saved, tmp_path)
    index = pickle.loads((checkpoint / METADATA).read_bytes())
    where = next((at for at in index.storage_data if key in at.fqn), MetadataIndex(EXTRA_STATE))
    evil = checkpoint / "evil.distcp"
    write_code(evil, "archive", tmp_path / "ran")
    point_to(checkpoint, where, evil)
    answers = read(runs)
    assert not (tmp_path / "ran").exists()
    assert_refused(answers, evil.name)
    assert_refused(answers, where.fqn)


def test_an_extra_state_is_let_in_if_it_is_empty(saved, tmp_path, read):
    """Transformer Engine unpickles the bytes of any other; checkpoints had empty ones before 2026-11-26."""
    runs, checkpoint = copy(saved, tmp_path)
    code = torch.frombuffer(bytearray(pickle.dumps(MakesFolder(tmp_path / "ran"))), dtype=torch.uint8)
    for number, state in enumerate([None, [None], [torch.empty(0, dtype=torch.uint8)], [code]]):
        file = checkpoint / f"state_{number}.distcp"
        torch.save(state, file)
        point_to(checkpoint, MetadataIndex(EXTRA_STATE.replace("0_4", f"{number}_4")), file)
        if number == 2:
            assert set(read(Path(shutil.copytree(runs, tmp_path / "harmless"))).values()) == {"read"}
    assert_refused(read(runs), f"{file} holds {EXTRA_STATE.replace('0_4', '3_4')}, which is not empty")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["pickle", "archive"])
def test_code_as_the_bytes_of_a_position_is_refused(saved, tmp_path, read, form):
    """As positions of a buffered stream once were: bytes in a tensor, which any load reads as that."""
    runs, checkpoint = copy(saved, tmp_path)
    write_code(tmp_path / "code", form, tmp_path / "ran")
    file = checkpoint / "position_00000.pt"
    torch.save(torch.frombuffer(bytearray((tmp_path / "code").read_bytes()), dtype=torch.uint8), file)
    write_checksums(checkpoint)
    answers = read(runs)
    assert not (tmp_path / "ran").exists()
    assert_refused({"resume": answers.pop("resume")}, f"{file}: the saved data position is a pickle")
    assert set(answers.values()) == {"read"}


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "step_1/../../x", "", "\x80\x04\x95"])
def test_the_pointer_to_the_newest_cannot_leave_its_stage(tmp_path, name):
    (tmp_path / LATEST).write_text(name)
    with pytest.raises(UserError, match="latest names .* which is no checkpoint of this stage"):
        find_latest(tmp_path)
    write_code(tmp_path / LATEST, "pickle", tmp_path / "ran")
    with pytest.raises(UserError, match="latest cannot be read"):
        find_latest(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 5000])
def test_processes_share_the_entries_and_open_each_of_their_files_once(
    saved: Path, tmp_path: Path, monkeypatch, size: int
) -> None:
    """Whichever entry holds code, one process and no other sees it."""
    _, checkpoint = copy(saved, tmp_path)
    index = safe_index.read_index(checkpoint)
    entries = sorted(index.storage_data.items(), key=lambda entry: (entry[1].relative_path, entry[1].offset))
    planted = [entries[0], entries[len(entries) // 2], entries[-1]]
    for _, at in planted:
        with (checkpoint / at.relative_path).open("r+b") as handle:
            handle.seek(at.offset)
            handle.write(pickle.dumps(MakesFolder(tmp_path / "ran")))
    opened: list[Path] = []
    usual = Path.open
    monkeypatch.setattr(Path, "open", lambda file, *mode: opened.append(file) or usual(file, *mode))
    found = []
    for rank in range(size):
        opened.clear()
        found += safe_index._unsafe_entries(checkpoint, index, rank, size)
        assert len(opened) == len(set(opened))
    named = [f"{checkpoint / at.relative_path} holds {where.fqn}, which cannot be loaded" for where, at in planted]
    assert len(found) == 3 and all(any(line.startswith(name) for line in found) for name in named)
    assert not (tmp_path / "ran").exists()
