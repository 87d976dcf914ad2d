"""Machines as data: what a GPU and its links can do, each number with the public page it comes from.

The profiles are YAML files in ``profiles/``. A rate that was measured on one's own machine replaces one of theirs by a
file of the same form (``megatron-eagle plan --gpu my_cluster.yaml``). Peaks are for dense bf16 with float32 sums, the
ones utilisation is stated against; the planner computes times with the *achievable* rates beside them.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Gt, Le
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT, Positive
from megatron_eagle.config.shipped import file_or_name
from megatron_eagle.errors import UserError

Rate = Annotated[float, Gt(0)]
Share = Annotated[float, Gt(0), Le(1)]


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
    peak_flops: Rate
    products: Share
    attention: Share
    convolutions: Share
    memory_bytes: Rate
    reserved_bytes: Annotated[float, Gt(-1)]
    memory_bytes_per_second: Rate
    memory_share: Share
    gpus_per_node: Positive
    inside_bytes_per_second: Rate
    outside_bytes_per_second: Rate
    link_share: Share
    latency: Rate
    launch: Rate
    launches_ahead: bool
    checkpoint_bytes_per_second: Rate
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
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read hardware profile {path}: {error.strerror}") from None
    try:
        return TypeAdapter(Hardware).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"hardware profile {name}: {where + ': ' if where else ''}{first['msg']}") from None


def hardware_as_yaml(hardware: Hardware) -> str:
    """The profile as YAML that ``load_hardware`` reads back."""
    return yaml.safe_dump(asdict(hardware), sort_keys=False, width=120)
