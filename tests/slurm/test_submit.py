"""Submitting: what is refused before anything reaches Slurm, and what is written."""

import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from chain import ROOT, command, profile
from throwaway import ThrowawaySlurm

from megatron_eagle.cli import main
from megatron_eagle.cli.submit import warn_of_memory
from megatron_eagle.cluster import slurm as slurm_commands
from megatron_eagle.cluster.profile import TEMPLATES, load_profile
from megatron_eagle.cluster.submit import plan_chain
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.errors import UserError

EAGLE2_9B = ROOT / "examples" / "eagle2-9b" / "recipe.yaml"
SMALL = {"nodes": {"stage1": 2, "stage1.5": 2, "stage2": 2}}  # Eagle 2's recipe, as far as this Slurm can tell
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


@pytest.mark.parametrize(("gpu", "words"), [("h100", ()), ("rtx4090", ("stage1.5", "stage2"))])
def test_stages_that_do_not_fit_are_named(
    gpu: str, words: tuple[str, ...], h100: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h100.write_text(f"{H100}gpu: {gpu}\n")
    recipe, cluster = load_recipe(EAGLE2_9B), load_profile(str(h100))
    warn_of_memory(recipe, plan_chain(recipe, [], cluster, tmp_path), cluster.gpu)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split()[2] for line in said] == list(words)
    for line in said:
        assert "on 256 rtx4090" in line
        assert line.endswith("are there; 'megatron-eagle plan' names the nearest layout that fits")


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


def refusal(slurm: ThrowawaySlurm, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What ``submit`` says when it refuses; nothing may have reached the queue."""
    with mock.patch.dict(os.environ, slurm.environment), pytest.raises(SystemExit) as end:
        main(("submit", *map(str, arguments)))
    assert end.value.code == 2
    assert slurm.run("squeue", "--noheader") == ""
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        (
            {"tasks_per_node": None, "gpus_per_node": 8},
            (),
            "stage 'stage1' needs 16 nodes x 8 = 128 GPUs; partition 'main' gives one job 2 nodes = 16",
        ),
        (
            {"tasks_per_node": None, "gpus_per_node": 8, "nodes": {"stage1": 2, "stage1.5": 2, "stage2": 2}},
            (),
            "stage 'stage1' needs 2 nodes with 8 GPUs each; partition 'main' has 0 such nodes, and ",
        ),
        ({}, ("layout.pp=40",), "28"),
        ({"needs_account": True}, (), "cluster profile 'throwaway' has no account; set account: in it"),
        (
            {**SMALL, "partition": "ours"},
            (),
            "takes jobs of eagle, hawk only, cluster profile 'throwaway' has no account",
        ),
        ({**SMALL, "partition": "ours", "account": "owl"}, (), "profile 'throwaway' has account 'owl'"),
        (
            {**SMALL, "partition": "ours", "account": "hawk", "time_limit": "1-00:00:01"},
            (),
            "time_limit 1-00:00:01 of cluster profile 'throwaway' is more than partition 'ours' allows: 24 hours",
        ),
        ({**SMALL, "partition": "theirs"}, (), "Slurm refuses 'scontrol show partition --oneliner theirs'"),
        (
            {**SMALL, "cpus_per_task": 50},
            (),
            "Slurm refuses 'sbatch --test-only",
        ),
    ],
)
def test_what_cannot_work_here_never_reaches_the_queue(
    slurm: ThrowawaySlurm,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    overrides: tuple[str, ...],
    words: str,
    tmp_path: Path,
) -> None:
    """The last one is Slurm's own finding: two nodes are there, but not with that many CPUs."""
    cluster = profile(tmp_path / "cluster.yaml", **changes)
    said = refusal(slurm, capsys, EAGLE2_9B, *overrides, "--cluster", cluster, "--runs", tmp_path / "runs")
    assert said.startswith("megatron-eagle: ") and words in said and "\n" not in said
    assert "sbatch" in words or not (tmp_path / "runs").exists()


def test_variables_of_the_shell_that_overrule_the_script_are_refused(
    slurm: ThrowawaySlurm, capsys: pytest.CaptureFixture[str], cluster: Path, tmp_path: Path
) -> None:
    """sbatch takes them for options, and prefers them to those of the script."""
    arguments = (EAGLE2_9B, "--cluster", cluster, "--runs", tmp_path / "runs")
    with mock.patch.dict(os.environ, {"SBATCH_TIMELIMIT": "1", "SBATCH_QOS": "low"}):
        said = refusal(slurm, capsys, *arguments)
        assert said.startswith("megatron-eagle: this shell sets SBATCH_QOS, SBATCH_TIMELIMIT, with which sbatch would")
        assert refusal(slurm, capsys, *arguments, "--dry-run") == said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("04:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
    ],
)
def test_times_as_slurm_writes_them(written: str, seconds: int) -> None:
    assert slurm_commands.seconds(written) == seconds


def test_a_folder_that_exists_is_not_exported_to(h100: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        plan_chain(load_recipe(EAGLE2_9B), [], load_profile(str(h100)), tmp_path, tmp_path)


@pytest.mark.slow
def test_dry_run_needs_no_slurm_and_leaves_nothing(h100: Path, tmp_path: Path) -> None:
    bare = {key: value for key, value in os.environ.items() if key != "PATH"} | {"PATH": "/nowhere"}
    arguments = ("submit", str(EAGLE2_9B), "--cluster", str(h100), "--runs", str(tmp_path / "runs"), "--dry-run")
    shown = command(*arguments, environment=bare)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#!/bin/bash") == 3 and "Slurm is not installed here" in shown.stdout
    assert not (tmp_path / "runs").exists()
