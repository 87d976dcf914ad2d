"""Machines as data: what a GPU and its links can do, each number with the public page it comes from.

The profiles are YAML files in ``profiles/``. A rate that was measured on one's own machine replaces one of theirs by a
file of the same form (``megatron-eagle plan --gpu my_cluster.yaml``). Peaks are for dense bf16 with float32 sums, the
ones utilisation is stated against; the planner computes times with the *achievable* rates beside them.
"""

from dataclasses import asdict
from pathlib import Path

import yaml
from pydantic.dataclasses import dataclass

from megatron_eagle.config.findings import checked
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Flag, NotNegative, Positive, Share
from megatron_eagle.config.shipped import file_or_name
from megatron_eagle.config.yaml_file import read_yaml


@dataclass(frozen=True, config=STRICT)
class Hardware:
    """One kind of GPU (or CPU process) and the cluster around it.

    peak_flops: dense bf16, per second. products, attention, convolutions: the shares of it that matrix products of a
        training run, attention cores and encoders of convolutions reach.
    memory_bytes: as the vendor counts them; reserved_bytes: what is no tensor (CUDA context, NCCL, fragmentation).
    memory_bytes_per_second: of HBM. memory_share: what element-wise passes reach of it.
    gpus_per_node: processes that meet over ``inside_bytes_per_second``; all others over ``outside_bytes_per_second``
        (one direction, per GPU). link_share: what collectives reach of either. latency: seconds of one exchange.
    launch: seconds that one decoder or encoder layer takes at least, forward, however little it has to do;
        launches_ahead: whether that runs beside the computing (a GPU computes one kernel while the next are launched)
        or adds to it (a CPU).
    checkpoint_bytes_per_second: writing, per node.
    sources: for each of these, where its number comes from.
    """

    name: str
    peak_flops: AboveZero
    products: Share
    attention: Share
    convolutions: Share
    memory_bytes: AboveZero
    reserved_bytes: NotNegative
    memory_bytes_per_second: AboveZero
    memory_share: Share
    gpus_per_node: Positive
    inside_bytes_per_second: AboveZero
    outside_bytes_per_second: AboveZero
    link_share: Share
    latency: AboveZero
    launch: AboveZero
    launches_ahead: Flag
    checkpoint_bytes_per_second: AboveZero
    sources: dict[str, str]

    def __post_init__(self) -> None:
        numbers = {
            name
            for name, value in vars(self).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        unexplained = sorted(numbers - set(self.sources))
        if unexplained:
            raise ValueError(f"profile '{self.name}' gives no source for {', '.join(unexplained)}")

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``: only a GPU runs beside the process that launches its kernels."""
        return "cuda" if self.launches_ahead else "cpu"

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes - self.reserved_bytes


def shipped_hardware() -> dict[str, Path]:
    """name -> file, of the profiles that come with the package."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "profiles").glob("*.yaml"))}


def load_hardware(name: str) -> Hardware:
    """A profile by name (``h100``) or a YAML file of one's own; UserError says what is wrong with it."""
    path = file_or_name(name, "hardware profile", shipped_hardware())
    return checked(Hardware, read_yaml(path, "hardware profile"), f"hardware profile {name}")


def hardware_as_yaml(hardware: Hardware) -> str:
    """The profile as YAML that ``load_hardware`` reads back."""
    return yaml.safe_dump(asdict(hardware), sort_keys=False, width=120)
