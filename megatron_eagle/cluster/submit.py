"""Submits the stages of a recipe as a chain of Slurm jobs, after everything that can be checked before has been.

Each job's script is a template of ``slurm/`` below the site's settings, complete in itself: it lies in the run folder
beside the recipe it will train, overrides and defaults filled in, and can be read, changed and given to sbatch by hand.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.events import append_event, newest_step, read_events
from megatron_eagle.cluster.profile import TEMPLATES, Profile, shipped_profiles
from megatron_eagle.config.recipe import Recipe, Stage, recipe_as_yaml
from megatron_eagle.data.sample.tokenizer import check_if_there
from megatron_eagle.errors import UserError

EXPORT = "export"  # name of the job after the last stage


@dataclass(frozen=True)
class Link:
    """One job of the chain. text: its whole script; stage: None for the export at the end."""

    name: str
    stage: Stage | None
    nodes: int
    processes: int
    text: str


@dataclass(frozen=True)
class Chain:
    """What is to be submitted. folder: of the run, absolute, because jobs start anywhere."""

    recipe: Recipe
    folder: Path
    links: tuple[Link, ...]

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    def script(self, link: Link) -> Path:
        return self.jobs / f"{link.name}.sbatch"

    def log(self, link: Link, job: str) -> Path:
        return self.jobs / f"{link.name}-{job}.log"


def plan_chain(
    recipe: Recipe,
    stage_names: Sequence[str],
    profile: Profile,
    runs: Path,
    export: Path | None = None,
    *,
    fallback: bool = False,
) -> Chain:
    """Scripts of all jobs; UserError if a stage cannot run on that many processes, or with the recipe's tokenizer.

    fallback: each stage passes over its damaged checkpoints.
    """
    if missing := missing_account(profile):
        raise UserError(missing)
    check_if_there(recipe)
    folder = (runs / recipe.name).resolve()
    if "\\" in str(folder) or not str(folder).isprintable():
        raise UserError(
            f"the run folder {str(folder)!r} has a backslash or a control character, which sbatch cannot take"
        )
    stages = [recipe.stage(name) for name in stage_names] or list(recipe.stages)
    if stages != sorted(stages, key=recipe.stages.index):
        names = ", ".join(stage.name for stage in recipe.stages)
        raise UserError(f"stages {', '.join(stage_names)} are not in the order of the recipe: {names}")
    if EXPORT in (stage.name for stage in stages):
        raise UserError(f"a stage cannot be called '{EXPORT}', as the chain's last job is: rename it in the recipe")
    before = recipe.stage_before(stages[0])
    if before is not None and newest_step(folder, before.name) < before.steps:
        raise UserError(
            f"stage '{stages[0].name}' starts from '{before.name}', which is at step "
            f"{newest_step(folder, before.name)} of {before.steps} in {folder}; submit it, too"
        )
    links = [_stage_link(recipe, stage, profile, folder, fallback) for stage in stages]
    if export is not None:
        if export.exists():
            raise UserError(f"the model would be exported to {export}, which exists already; name another folder")
        links.append(_export_link(recipe, stages[-1], profile, folder, export.resolve()))
    return Chain(recipe, folder, tuple(links))


def missing_account(profile: Profile) -> str | None:
    """What is wrong with a profile that wants an account and has none; it may be one that only comes along."""
    if profile.account or not profile.needs_account:
        return None
    copy = shipped_profiles().get(profile.name)
    return f"cluster profile '{profile.name}' has no account; set account: in it" + (
        f" (give a copy of {copy} as --cluster)" if copy else ""
    )


def submit_chain(chain: Chain) -> list[str]:
    """Write the scripts, have Slurm check each, and submit all or none; returns the jobs' numbers."""
    _refuse_two_at_once(chain)
    _write(chain)
    for link in chain.links:
        slurm.check(chain.script(link))
    jobs: list[str] = []
    try:
        for link in chain.links:
            jobs.append(slurm.submit(chain.script(link), after=jobs[-1] if jobs else None))
            steps = link.stage.steps if link.stage else 0
            append_event(
                chain.folder, "submitted", stage=link.name, job=jobs[-1], steps=steps, processes=link.processes
            )
    except UserError:
        slurm.cancel(jobs)
        raise
    return jobs


def _refuse_two_at_once(chain: Chain) -> None:
    """Two jobs that train the same stage would overwrite each other's checkpoints."""
    known = [event["job"] for event in read_events(chain.folder) if event["event"] == "submitted"]
    active = slurm.states(known)
    if active:
        listed = ", ".join(f"{job} ({state.lower()})" for job, (state, _) in sorted(active.items()))
        raise UserError(f"{chain.folder} already has jobs in the queue: {listed}; cancel them first")


def _write(chain: Chain) -> None:
    try:
        chain.jobs.mkdir(parents=True, exist_ok=True)
        (chain.jobs / "recipe.yaml").write_text(recipe_as_yaml(chain.recipe), encoding="utf-8")
        for link in chain.links:
            chain.script(link).write_text(link.text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {chain.jobs}: {error.strerror}") from None


def _stage_link(recipe: Recipe, stage: Stage, profile: Profile, folder: Path, fallback: bool) -> Link:
    nodes = _nodes(stage, profile)
    processes = nodes * profile.processes_per_node
    try:
        replicas = recipe.stage_layout(stage).data_parallel_size(processes)
    except ValueError as error:
        raise UserError(f"stage '{stage.name}' on {nodes} nodes: {error}") from None
    if stage.batch % replicas:
        raise UserError(
            f"stage '{stage.name}' on {nodes} nodes: batch={stage.batch} packs cannot be shared out evenly to "
            f"{replicas} data-parallel ranks"
        )
    hang = profile.hang
    settings = {
        "STAGE": stage.name,
        **({"FALLBACK": "1"} if fallback else {}),
        **_budget(profile),
        "EXCLUDE_BAD_NODES": str(int(profile.restarts.exclude_bad_nodes)),
        "PREFLIGHT": str(int(profile.preflight)),
        "MIN_FREE_GB": f"{profile.min_free_gb:g}",
        "PREFLIGHT_SECONDS": f"{profile.preflight_seconds:g}",
        "HANG": f"{hang.factor:g},{hang.at_least:g},{hang.otherwise:g},{hang.grace:g}",
    }
    directives = [
        f"--nodes={nodes}",
        f"--ntasks-per-node={profile.processes_per_node}",
        f"--time={profile.time_limit}",
        f"--signal=B:USR1@{profile.stop_seconds}",
        "--requeue",
        "--open-mode=append",
    ]
    if profile.gpus_per_node and profile.gpu_request:
        directives.append(f"--gpus-per-node={profile.gpus_per_node}")
    if profile.cpus_per_task:
        directives.append(f"--cpus-per-task={profile.cpus_per_task}")
        settings["SRUN_CPUS_PER_TASK"] = str(profile.cpus_per_task)  # srun no longer inherits it since Slurm 22.05
    return Link(
        stage.name, stage, nodes, processes, _script("train", stage.name, directives, settings, profile, folder)
    )


def _export_link(recipe: Recipe, last: Stage, profile: Profile, folder: Path, out: Path) -> Link:
    # A whole node, for its memory: the proof holds the model twice.
    directives = ["--nodes=1", "--ntasks=1", "--exclusive", f"--time={profile.time_limit}"]
    directives += ["--requeue", "--open-mode=append"]
    if profile.gpus_per_node and profile.gpu_request:
        directives.append("--gpus-per-node=1")
    settings = {
        "CHECKPOINT": f"{folder}/checkpoints/{last.name}",
        "EXPORT": str(out),
        "TOKENIZER": recipe.tokenizer.path,
        **_budget(profile),
    }
    return Link(EXPORT, None, 1, 1, _script("export", EXPORT, directives, settings, profile, folder))


def _budget(profile: Profile) -> dict[str, str]:
    restarts = profile.restarts
    return {"FAILURES": str(restarts.failures), "WITHOUT_PROGRESS": str(restarts.without_progress)}


def _nodes(stage: Stage, profile: Profile) -> int:
    """The profile's word, or the processes the recipe plans for the stage (for Eagle 2 the published ones)."""
    if stage.name in profile.nodes:
        return profile.nodes[stage.name]
    if stage.gpus is None:
        raise UserError(
            f"stage '{stage.name}' has no gpus in the recipe and no entry under nodes in cluster profile "
            f"'{profile.name}'"
        )
    if stage.gpus % profile.processes_per_node:
        raise UserError(
            f"stage '{stage.name}' is planned for {stage.gpus} GPUs, which are no whole number of nodes of "
            f"{profile.processes_per_node}; set nodes: in cluster profile '{profile.name}'"
        )
    return stage.gpus // profile.processes_per_node


def _script(
    template: str, name: str, directives: Sequence[str], settings: dict[str, str], profile: Profile, folder: Path
) -> str:
    jobs = str(folder / "jobs")
    site = [f"--job-name={folder.name}-{name}", f"--output={jobs.replace('%', '%%')}/{name}-%j.log"]
    if profile.partition:
        site.append(f"--partition={profile.partition}")
    if profile.account:
        site.append(f"--account={profile.account}")
    if profile.exclude:
        site.append(f"--exclude={','.join(profile.exclude)}")
    srun, prefix = _container(profile)
    variables = {
        "RECIPE": f"{jobs}/recipe.yaml",
        "RUN_FOLDER": str(folder),
        "LOG_PREFIX": f"{jobs}/{name}",
        **settings,
        "PYTHON": profile.python,
        "CONTAINER": prefix,
        "SRUN_OPTIONS": srun,
    }
    if taken := ", ".join(sorted(variables.keys() & profile.environment.keys())):
        raise UserError(f"environment of cluster profile '{profile.name}' has {taken}, which submit sets itself")
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by megatron-eagle submit for cluster '{profile.name}': {name} of {folder}.",
            *(f"#SBATCH {_quoted(option)}" for option in [*site, *directives]),
            *(f"#SBATCH {option}" for option in profile.sbatch),
            "",
            *profile.setup,
            *(f"export {key}={shlex.quote(value)}" for key, value in {**variables, **profile.environment}.items()),
            _body(TEMPLATES / f"{template}.sbatch"),
        ]
    )


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a script: spaces and # end one, quotes and backslashes are escaped."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", option):
        return option
    name, _, value = option.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def _container(profile: Profile) -> tuple[str, str]:
    """Options of srun, and what stands before the command; as words that bash reads."""
    container = profile.container
    options = [word for option in profile.srun for word in shlex.split(option)]
    if container.runtime == "pyxis":
        options += [f"--container-image={container.image}", "--no-container-mount-home"]
        options += [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    if container.runtime != "apptainer":
        return shlex.join(options), ""
    gpus = ["--nv"] if profile.gpus_per_node else []
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return shlex.join(options), shlex.join(["apptainer", "exec", *gpus, *binds, str(container.image)])


def _body(template: Path) -> str:
    """The template without its own #SBATCH lines and what stands above them, which is for use by hand."""
    lines = template.read_text(encoding="utf-8").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    return "\n".join(lines[last + 1 :]) + "\n"
