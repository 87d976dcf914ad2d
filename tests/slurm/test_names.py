"""Names and settings are data: what a run folder, a profile or a recipe holds never becomes a command of the script."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from chain import ROOT, SubmittedChain, losses, profile, small_recipe, stand_in_python, submit
from stand_in import expected_losses
from throwaway import ThrowawaySlurm

from megatron_eagle.cluster.profile import TEMPLATES, load_profile
from megatron_eagle.cluster.submit import Chain, plan_chain
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.errors import UserError

EAGLE2_9B = ROOT / "examples" / "eagle2-9b" / "recipe.yaml"
ODD = "a b'c\"d#e %j;$(touch x)`y`*"

TELLS = """printf '%s\\n' "$OUTCOME" "$STAGE" "$RUN_FOLDER" "$LOG" "$EVENT" """


def planned(folder: Path, runs: Path, *overrides: str, export: Path | None = None, **changes: object) -> Chain:
    settings = {"tasks_per_node": None, "gpus_per_node": 8, **changes}
    cluster = load_profile(str(profile(folder / "cluster.yaml", **settings)))
    return plan_chain(load_recipe(EAGLE2_9B, list(overrides)), ["stage1"], cluster, runs, export)


@pytest.mark.slow
def test_a_chain_in_a_folder_with_an_odd_name(slurm: ThrowawaySlurm, small_run, tmp_path: Path) -> None:
    """Its interpreter, too, lies in such a folder, and the scripts run as the site's settings say, word for word."""
    runs = tmp_path / ODD
    runs.mkdir()
    recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=4)
    python = str(stand_in_python(runs))
    environment = {"PYTHONPATH": str(ROOT), "ODD": ODD}
    srun = ["--export=ALL", f"--comment='{ODD.replace(chr(39), '')}' --quit-on-interrupt"]
    settings = {"environment": environment, "srun": srun, "sbatch": ['--comment="#1 ;"']}
    cluster = profile(tmp_path / "c.yaml", python=python, notify=TELLS + f" >> {tmp_path}/told; false", **settings)
    chain: SubmittedChain = submit(slurm, recipe, cluster, runs, "--stages", "stage1")
    assert chain.wait() == {"stage1": "COMPLETED"}, chain.logs()
    assert losses(runs) == expected_losses(yaml.safe_load(recipe.read_text())["stages"][:1])
    log = chain.folder / "jobs" / f"stage1-{chain.jobs['stage1']}.log"
    assert "notify: exit 1" in log.read_text()
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:4] == ["complete", "stage1", str(chain.folder), str(log)] and '"outcome": "complete"' in told[4]
    assert slurm.job(chain.jobs["stage1"])["Comment"] == "#1"  # up to its space, as this harness reads it
    assert not [path for path in tmp_path.rglob("x")]


@pytest.mark.long
def test_a_stage_that_is_given_up_is_told(slurm: ThrowawaySlurm, small_run, tmp_path: Path) -> None:
    """Of two that are complete or given up, only the last's end and any failure are told."""
    recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=4)
    environment = {"PYTHONPATH": str(ROOT), "STAND_IN_DIES_AT": "stage1.5 2 0"}
    settings = {"python": str(stand_in_python(tmp_path)), "restarts": {"failures": 0}, "environment": environment}
    cluster = profile(tmp_path / "c.yaml", notify=TELLS + f" >> {tmp_path}/told", **settings)
    chain = submit(slurm, recipe, cluster, tmp_path)
    assert chain.wait() == {"stage1": "COMPLETED", "stage1.5": "FAILED", "stage2": "CANCELLED"}, chain.logs()
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:2] == ["failed", "stage1.5"] and '"event": "gave_up"' in told[4] and len(told) == 5


@pytest.mark.long
def test_a_stage_by_hand(slurm: ThrowawaySlurm, small_run, tmp_path: Path) -> None:
    """As the template's head says, from elsewhere: with COMMON, and without."""
    recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=4)
    values = {"RECIPE": recipe, "RUN_FOLDER": tmp_path / "small", "STAGE": "stage1", "PREFLIGHT": 0}
    values |= {"PYTHON": stand_in_python(tmp_path), "PYTHONPATH": ROOT}
    ends = {}
    for name, more in (("with", {"COMMON": TEMPLATES / "common.bash"}), ("without", {})):
        export = ",".join(["--export=ALL", *(f"{key}={value}" for key, value in (values | more).items())])
        options = ["--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/{name}.log", f"--chdir={tmp_path}"]
        job = slurm.run("sbatch", "--parsable", *options, export, str(TEMPLATES / "train.sbatch")).strip()
        slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "its end", 60)  # noqa: B023
        ends[name] = slurm.state(job)
    assert ends == {"with": "COMPLETED", "without": "FAILED"}, (tmp_path / "with.log").read_text()
    assert losses(tmp_path) == expected_losses(yaml.safe_load(recipe.read_text())["stages"][:1])
    assert "slurm/common.bash: No such file or directory" in (tmp_path / "without.log").read_text()


@pytest.mark.parametrize("character", ["\\", "\n", "\t", "\x7f"])
def test_a_run_folder_that_sbatch_cannot_take(tmp_path: Path, character: str) -> None:
    with pytest.raises(UserError, match="has a backslash or a control character"):
        planned(tmp_path, tmp_path / f"a{character}b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a\n#SBATCH --array=1-9"}, "name: .*line break"),
        ({"partition": "main\nrm -rf /"}, "partition: .*line break"),
        ({"account": "a\rb"}, "account: .*line break"),
        ({"exclude": ["n1\nn2"]}, "exclude.*line break"),
        ({"python": "python\n;"}, "python: .*line break"),
        ({"environment": {"A": "b\nc"}}, "environment.*line break"),
        ({"environment": {"A;touch x": "b"}}, r"environment.*a text of the form"),
        ({"sbatch": ["--qos=a\ntouch x"]}, "sbatch.*line break"),
        ({"sbatch": ["qos=a"]}, "is no option"),
        ({"sbatch": ['--comment="a']}, "No closing quotation"),
        ({"srun": ["touch x"]}, "is no option"),
        ({"time_limit": "30\n"}, "time_limit"),
        ({"container": {"runtime": "apptainer", "image": "a\n.sif"}}, "image.*line break"),
        ({"sbatch": ["--time=9-0"]}, "'--time=9-0', which is set by time_limit"),
        ({"sbatch": ["--qos=long -t9-0"]}, "'-t9-0', which is set by time_limit"),
        ({"sbatch": ["--part=theirs"]}, "'--part=theirs', which is set by partition"),
        ({"sbatch": ["--no-requeue"]}, "which is set by submit itself"),
        ({"sbatch": ["--gpus-per-node=h100:8"]}, "which is set by gpus_per_node and gpu_request"),
    ],
)
def test_settings_that_would_leave_their_line_or_their_check(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        planned(tmp_path, tmp_path, **changes)


def test_what_submit_sets_is_not_set_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'throwaway' has RUN_FOLDER, STAGE, which submit sets itself"):
        planned(tmp_path, tmp_path, environment={"STAGE": "stage2", "RUN_FOLDER": "/", "NCCL_DEBUG": "INFO"})


def test_options_of_the_site_are_left_to_it(tmp_path: Path) -> None:
    (link,) = planned(
        tmp_path, tmp_path, sbatch=["--qos=long", "--gpus-per-node=h100:8 --mem=0"], gpu_request=False
    ).links
    assert "\n#SBATCH --qos=long\n#SBATCH --gpus-per-node=h100:8 --mem=0\n" in link.text


def test_a_stage_has_not_the_name_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a stage cannot be called 'export'"):
        recipe = load_recipe(EAGLE2_9B, ["stages.stage1.name=export"])
        cluster = load_profile(str(profile(tmp_path / "c.yaml", tasks_per_node=8)))
        plan_chain(recipe, [], cluster, tmp_path, tmp_path / "out")


def test_a_container_is_given_its_words(tmp_path: Path) -> None:
    container = {"runtime": "apptainer", "image": "/a b/c.sif", "mounts": ["/d $e:/d $e"]}
    (link,) = planned(tmp_path, tmp_path, container=container).links
    lines = [line for line in link.text.splitlines() if "CONTAINER=" in line or line.startswith(("srun_opt", "eval"))]
    shown = subprocess.run(
        ["bash", "-uc", "SRUN_OPTIONS=; " + "\n".join(lines) + '\nprintf "%s\\n" "${eagle[@]}"'],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    assert shown == ["apptainer", "exec", "--nv", "--bind", "/d $e:/d $e", "/a b/c.sif"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    """In the templates, and in what is made of them."""
    chain = planned(tmp_path, tmp_path / "a b#", export=tmp_path / "out")
    scripts = [TEMPLATES / "train.sbatch", TEMPLATES / "export.sbatch"]  # and what they source
    for link in chain.links:
        scripts.append(tmp_path / f"{link.name}.sbatch")
        scripts[-1].write_text(link.text)
    line = ["shellcheck", "--external-sources", "--check-sourced", f"--source-path={TEMPLATES.parent}", *scripts]
    done = subprocess.run(line, text=True, capture_output=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout
