"""A job's batch script: sbatch's options and the site's settings, each quoted for its reader, above a template."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.cluster.profile import TEMPLATES, Profile
from megatron_eagle.errors import UserError

COMMON = "common.bash"  # what the templates share, beside them
JOBS = "jobs"  # folder of the scripts and logs in the run's folder; in the queue it tells whose a job is


def batch_script(
    template: str, name: str, directives: Sequence[str], settings: dict[str, str], profile: Profile, folder: Path
) -> str:
    """The whole script of job ``name`` of the run in ``folder``.

    template: ``slurm/<template>.sbatch``. directives, settings: sbatch's options and variables beside the site's.
    UserError if the profile's environment sets one of those variables.
    """
    jobs = str(folder / JOBS)
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
    """The template without its own #SBATCH lines and what stands above them, which is for use by hand.

    What it sources is put in its place: Slurm starts a copy of the script elsewhere, hours later and again after that,
    and what is installed may have changed by then.
    """
    lines = template.read_text(encoding="utf-8").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    at = next(number for number, line in enumerate(lines) if line.startswith("source "))
    common = template.with_name(COMMON).read_text(encoding="utf-8").splitlines()
    return "\n".join([*lines[last + 1 : at - 1], *common, *lines[at + 1 :]]) + "\n"  # at - 1: shellcheck's word on it
