"""Which machine a report is of: device, driver, versions, commit."""

import importlib.metadata
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eagle import __version__

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "numpy")


@dataclass(frozen=True)
class Machine:
    """device: its name, "cpu" without a GPU. memory_bytes: of one GPU. commit: ends in "-dirty" if files differ."""

    device: str
    gpus: int
    memory_bytes: int
    driver: str
    cuda: str
    python: str
    processor: str
    versions: dict[str, str]
    commit: str

    @property
    def slug(self) -> str:
        """The device's name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


def this_machine() -> Machine:
    """This one."""
    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return Machine(
        device=properties.name if properties else "cpu",
        gpus=torch.cuda.device_count() if cuda else 0,
        memory_bytes=properties.total_memory if properties else 0,
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        cuda=torch.version.cuda or "none",
        python=platform.python_version(),
        processor=_processor(),
        versions={name: _version(name) for name in PACKAGES},
        commit=_commit(),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this file lies in; the package's version where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return f"version {__version__}"
    return _said("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _said(*command: str) -> str:
    """The first line that a command prints, "unknown" if it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split("\n")), "").strip() or "unknown"
