"""Submitting: what is refused before anything reaches Slurm, and what is written."""

import os
import subprocess
from pathlib import Path

import pytest
from chain import ROOT, command, profile
from throwaway import ThrowawaySlurm

from megatron_eagle.cluster.profile import TEMPLATES, load_profile
from megatron_eagle.cluster.submit import plan_chain
from megatron_eagle.errors import UserError
from megatron_eagle.recipe import load_recipe

EAGLE2_9B = ROOT / "examples" / "eagle2-9b" / "recipe.yaml"
H100 = "name: h100\npartition: main\ngpus_per_node: 8\n"


@pytest.fixture
def h100(tmp_path: Path) -> Path:
    path = tmp_path / "h100.yaml"
    path.write_text(H100)
    return path


def test_published_scales_are_the_defaults(h100: Path, tmp_path: Path) -> None:
    chain = plan_chain(load_recipe(EAGLE2_9B), [], load_profile(str(h100)), tmp_path)
    assert [(link.name, link.nodes, link.processes) for link in chain.links] == [
        ("stage1", 16, 128),
        ("stage1.5", 32, 256),
        ("stage2", 32, 256),
    ]
    for link in chain.links:
        assert f"#SBATCH --nodes={link.nodes}\n#SBATCH --ntasks-per-node=8\n" in link.text
        assert "#SBATCH --gpus-per-node=8" in link.text and "#SBATCH --partition=main" in link.text


def test_the_export_follows_the_last_stage(h100: Path, tmp_path: Path) -> None:
    chain = plan_chain(load_recipe(EAGLE2_9B), ["stage1"], load_profile(str(h100)), tmp_path, tmp_path / "out")
    assert [link.name for link in chain.links] == ["stage1", "export"]
    assert f"export CHECKPOINT={chain.folder}/checkpoints/stage1\n" in chain.links[1].text


@pytest.mark.parametrize(
    ("overrides", "stages", "changes", "words"),
    [
        (["layout.pp=40"], [], {}, "28"),
        ([], [], {"nodes": {"stage1": 15}}, "batch=1024 packs cannot be shared out evenly to 30 data-parallel ranks"),
        (["layout.tp=7"], [], {}, "tp=7"),
        ([], [], {"needs_account": True}, "has no account"),
        ([], ["stage2"], {}, "starts from 'stage1.5', which is at step 0 of"),
        ([], ["stage1.5", "stage1"], {}, "not in the order of the recipe"),
        ([], ["stage9"], {}, "stage 'stage9' does not exist"),
        ([], [], {"gpus_per_node": 3}, "planned for 128 GPUs, which are no whole number of nodes of 3"),
        ([], [], {"gpus_per_node": 8, "tasks_per_node": 4}, "a GPU has one process"),
        ([], [], {"time_limit": "soon"}, "time_limit"),
        ([], [], {"patition": "main"}, "patition"),
        ([], [], {"container": {"runtime": "pyxis"}}, "give both"),
    ],
)
def test_what_cannot_work_is_refused(
    overrides: list[str], stages: list[str], changes: dict, words: str, tmp_path: Path
) -> None:
    settings = {"tasks_per_node": None, "gpus_per_node": 8, **changes}
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        cluster = load_profile(str(profile(tmp_path / "cluster.yaml", **settings)))
        plan_chain(load_recipe(EAGLE2_9B, overrides), stages, cluster, tmp_path)


@pytest.mark.parametrize("name", ["cpu", "blank", "h100"])
def test_profiles_that_come_along_are_valid(name: str) -> None:
    assert load_profile(name).processes_per_node > 0


@pytest.mark.parametrize("template", ["train", "export"])
def test_templates_are_valid_bash(template: str) -> None:
    subprocess.run(["bash", "-n", TEMPLATES / f"{template}.sbatch"], check=True)


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"runtime": "pyxis", "image": "a.sqsh", "mounts": ["/d:/d", "/e:/e"]}, "--container-mounts=/d:/d,/e:/e"),
        ({"runtime": "apptainer", "image": "a.sif", "mounts": ["/d:/d"]}, "apptainer exec --nv --bind /d:/d a.sif"),
    ],
)
def test_containers(container: dict, words: str, tmp_path: Path) -> None:
    cluster = profile(tmp_path / "c.yaml", tasks_per_node=None, gpus_per_node=8, container=container)
    chain = plan_chain(load_recipe(EAGLE2_9B), ["stage1"], load_profile(str(cluster)), tmp_path)
    assert words in chain.links[0].text


def test_more_than_the_partition_has_is_refused_by_submit(slurm: ThrowawaySlurm, h100: Path, tmp_path: Path) -> None:
    arguments = ("submit", str(EAGLE2_9B), "--cluster", str(h100), "--runs", str(tmp_path / "runs"))
    refused = command(*arguments, environment=slurm.environment)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "megatron-eagle: stage 'stage1' needs 16 nodes x 8 = 128 GPUs; partition 'main' gives one job 2 nodes = 16"
    )
    assert not (tmp_path / "runs").exists() and slurm.run("squeue", "--noheader") == ""


def test_slurm_has_the_last_word(slurm: ThrowawaySlurm, recipe: Path, tmp_path: Path) -> None:
    """Two nodes are there, but not with that many CPUs: sbatch --test-only says so, and nothing is submitted."""
    cluster = profile(tmp_path / "cluster.yaml", cpus_per_task=50)
    arguments = ("submit", str(recipe), "--cluster", str(cluster), "--runs", str(tmp_path))
    refused = command(*arguments, environment=slurm.environment)
    assert refused.returncode == 2 and "Slurm refuses 'sbatch --test-only" in refused.stderr
    assert slurm.run("squeue", "--noheader") == ""


def test_dry_run_needs_no_slurm_and_leaves_nothing(h100: Path, tmp_path: Path) -> None:
    bare = {key: value for key, value in os.environ.items() if key != "PATH"} | {"PATH": "/nowhere"}
    arguments = ("submit", str(EAGLE2_9B), "--cluster", str(h100), "--runs", str(tmp_path / "runs"), "--dry-run")
    shown = command(*arguments, environment=bare)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#!/bin/bash") == 3 and "Slurm is not installed here" in shown.stdout
    assert not (tmp_path / "runs").exists()
