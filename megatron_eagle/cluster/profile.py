"""A cluster profile: all that is true of a site and of no recipe, in one YAML file (``slurm/profiles``)."""

import shlex
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megatron_eagle.config.findings import checked
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Count, Flag, NotNegative, Positive
from megatron_eagle.config.shipped import file_or_name, shipped_folder
from megatron_eagle.config.yaml_file import read_yaml

TEMPLATES = shipped_folder("slurm")  # <kind>.sbatch
_SUBMIT = "submit itself"
# Options of sbatch that the chain depends on, and the key of the profile that sets each.
OWN_OPTIONS = {
    **dict.fromkeys(("time", "t"), "time_limit"),
    **dict.fromkeys(("partition", "p"), "partition"),
    **dict.fromkeys(("account", "A"), "account"),
    **dict.fromkeys(("exclude", "x"), "exclude"),
    **dict.fromkeys(("nodes", "N"), "nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "tasks_per_node"),
    **dict.fromkeys(("cpus-per-task", "c"), "cpus_per_task"),
    "signal": "stop_seconds",
    **dict.fromkeys(("job-name", "J", "output", "o", "error", "e", "open-mode", "requeue", "no-requeue"), _SUBMIT),
    **dict.fromkeys(("dependency", "d", "kill-on-invalid-dep", "hold", "H", "array", "a", "wrap"), _SUBMIT),
    **dict.fromkeys(("wait", "W", "test-only", "parsable"), _SUBMIT),
}
GPU_OPTIONS = dict.fromkeys(("gpus-per-node", "gpus", "G"), "gpus_per_node and gpu_request")


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} has a line break or another control character")
    return text


def _options(text: str) -> str:
    """An option, or some, with quotes as a shell has them."""
    try:
        words = shlex.split(_one_line(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    if not words or not words[0].startswith("-"):
        raise ValueError(f"{text!r} is no option: it has to begin with -")
    return text


Text = Annotated[str, AfterValidator(_one_line)]  # one line of the script, which it cannot leave
Options = Annotated[str, AfterValidator(_options)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


@dataclass(frozen=True, config=STRICT)
class Container:
    """runtime: ``pyxis`` (enroot, through srun's --container options), ``apptainer``, or ``none``.

    mounts: "HOST:INSIDE" folders; the runs, the data and, without ``pip install`` in the image, this project.
    """

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: Text | None = None
    mounts: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        if (self.runtime == "none") != (self.image is None):
            raise ValueError(f"runtime '{self.runtime}' with image {self.image!r}: give both, or 'none' and no image")


@dataclass(frozen=True, config=STRICT)
class Restarts:
    """How often a stage is started again (docs/slurm.md).

    failures: restarts after a failure (a dead rank, a hang, a bad node), over the whole stage.
    without_progress: starts in a row that may end, for whatever reason, without a new checkpoint.
    exclude_bad_nodes: leave out a node that a failure was traced to, while enough others remain.
    """

    failures: Count = 10
    without_progress: Positive = 3
    exclude_bad_nodes: Flag = True


@dataclass(frozen=True, config=STRICT)
class Hang:
    """``training.watchdog.HangLimits`` explains each; seconds."""

    factor: AboveZero = 20.0
    at_least: AboveZero = 300.0
    otherwise: AboveZero = 1800.0
    grace: NotNegative = 10.0


@dataclass(frozen=True, config=STRICT)
class Profile:
    """One site.

    gpus_per_node: 0 for nodes without GPUs; then ``tasks_per_node`` says how many processes each runs.
    gpu: kind of GPU, one of ``plan --gpu``'s or a file as it reads; with it, submitting says which stages do not fit.
    needs_account: refuse to submit while ``account`` is empty.
    nodes: nodes of a stage by its name; without an entry the recipe's ``gpus`` of the stage decide.
    time_limit: of each start, as Slurm writes it ("04:00:00"); a stage may need many starts.
    stop_seconds: how long before the limit the run is told to save. Slurm may be up to a minute early.
    setup: lines of bash before anything else (modules, a virtual environment); environment: variables of the job.
    python: the interpreter that has megatron-eagle, inside the container if there is one.
    sbatch, srun: further options of the site; of sbatch's none that another key sets, whose value would not be checked.
    notify: a command for bash when a stage is given up and when the chain is complete: it finds OUTCOME, STAGE,
        RUN_FOLDER, LOG and EVENT, the last line of events.jsonl, in its environment.
    preflight: run ``megatron-eagle doctor`` on all processes before each start; min_free_gb: what it wants free.
    preflight_seconds: how long it waits for a process before it calls the node bad.
    """

    name: Text
    tasks_per_node: Positive | None = None
    gpus_per_node: Count = 0
    gpu_request: Flag = True
    gpu: Text | None = None
    cpus_per_task: Positive | None = None
    partition: Text | None = None
    account: Text | None = None
    needs_account: Flag = False
    nodes: dict[str, Positive] = field(default_factory=dict)
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] = "04:00:00"
    stop_seconds: Positive = 300
    exclude: tuple[Text, ...] = ()
    container: Container = field(default_factory=Container)
    setup: tuple[str, ...] = ()
    environment: dict[Variable, Text] = field(default_factory=dict)
    python: Text = "python"
    sbatch: tuple[Options, ...] = ()
    srun: tuple[Options, ...] = ()
    notify: Text = ""
    preflight: Flag = True
    min_free_gb: NotNegative = 1.0
    preflight_seconds: AboveZero = 120.0
    restarts: Restarts = field(default_factory=Restarts)
    hang: Hang = field(default_factory=Hang)

    def __post_init__(self) -> None:
        if not self.gpus_per_node and not self.tasks_per_node:
            raise ValueError("tasks_per_node is needed where gpus_per_node is 0")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} with gpus_per_node={self.gpus_per_node}: a GPU has one process"
            )
        own = OWN_OPTIONS | (GPU_OPTIONS if self.gpus_per_node and self.gpu_request else {})
        for option in self.sbatch:
            for word in shlex.split(option):
                if key := _own(own, word):
                    raise ValueError(f"sbatch has {word!r}, which is set by {key}: leave it out there")

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node


def _own(own: dict[str, str], word: str) -> str | None:
    """The key that sets the option; sbatch takes the beginning of a long one (--part=a), and -t30."""
    if not word.startswith("--"):
        return own.get(word[1:2]) if word.startswith("-") else None
    name = word[2:].partition("=")[0]
    return next((key for long, key in own.items() if len(name) > 1 and long.startswith(name)), None)


def shipped_profiles() -> dict[str, Path]:
    """name -> file, of the cluster profiles that come with the package: one to copy for each kind of site."""
    return {file.stem: file for file in sorted((TEMPLATES / "profiles").glob("*.yaml"))}


def load_profile(name_or_path: str) -> Profile:
    """A YAML file, or the name of one in ``slurm/profiles``; UserError is one line."""
    path = file_or_name(name_or_path, "cluster profile", shipped_profiles())
    return checked(Profile, read_yaml(path, "cluster profile"), path)
