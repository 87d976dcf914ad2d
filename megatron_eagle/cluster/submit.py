"""Plans the stages of a recipe as a chain of Slurm jobs: their scripts, after all that can be checked without Slurm.

Each job's script is a template of ``slurm/`` below the site's settings, complete in itself: it lies in the run folder
beside the recipe it will train, overrides and defaults filled in, and can be read, changed and given to sbatch by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.events import is_over, newest_step
from megatron_eagle.cluster.profile import Profile, shipped_profiles
from megatron_eagle.cluster.script import JOBS, batch_script
from megatron_eagle.config.recipe import Recipe, Stage
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
        return self.folder / JOBS

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
    if before is not None and not _is_over(folder, before) and not _is_queued(folder, before):
        raise UserError(
            f"stage '{stages[0].name}' starts from '{before.name}', which is at step "
            f"{newest_step(folder, before.name)} of {before.steps} in {folder}; submit it, too"
        )
    more = {"FALLBACK": "1"} if fallback else {}
    last = stages[-1] if export is None else None
    links = [_stage_link(recipe, stage, profile, folder, more | _notify(profile, stage is last)) for stage in stages]
    if export is not None:
        if export.exists():
            raise UserError(f"the model would be exported to {export}, which exists already; name another folder")
        links.append(_export_link(recipe, stages[-1], profile, folder, export.resolve()))
    return Chain(recipe, folder, tuple(links))


def _is_over(folder: Path, stage: Stage) -> bool:
    return is_over(folder, stage.name, stage.steps, stage.patience)


def _is_queued(folder: Path, stage: Stage) -> bool:
    try:
        return stage.name in (job.name for job in slurm.queued_from(folder / JOBS).values())
    except UserError:  # a dry run where no Slurm answers
        return False


def missing_account(profile: Profile) -> str | None:
    """What is wrong with a profile that wants an account and has none; it may be one that only comes along."""
    if profile.account or not profile.needs_account:
        return None
    copy = shipped_profiles().get(profile.name)
    return f"cluster profile '{profile.name}' has no account; set account: in it" + (
        f" (give a copy of {copy} as --cluster)" if copy else ""
    )


def _stage_link(recipe: Recipe, stage: Stage, profile: Profile, folder: Path, more: dict[str, str]) -> Link:
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
        **more,
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
        stage.name, stage, nodes, processes, batch_script("train", stage.name, directives, settings, profile, folder)
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
        **_notify(profile, is_last=True),
    }
    return Link(EXPORT, None, 1, 1, batch_script("export", EXPORT, directives, settings, profile, folder))


def _budget(profile: Profile) -> dict[str, str]:
    restarts = profile.restarts
    return {"FAILURES": str(restarts.failures), "WITHOUT_PROGRESS": str(restarts.without_progress)}


def _notify(profile: Profile, is_last: bool) -> dict[str, str]:
    return {"NOTIFY": profile.notify, "NOTIFY_OF": "failed complete" if is_last else "failed"}


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
