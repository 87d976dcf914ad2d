"""Which wheels to carry to a machine without a network, so that this project runs beside what is installed there.

There:  python -m pip list --format=freeze > machine.txt
Here:   python tools/offline_wheels.py machine.txt --python 3.12 --leave-out av --download wheels
There:  python -m pip install --no-deps --no-index --find-links wheels wheels/*.whl, and this checkout on the PYTHONPATH

Run it in an environment of this project (make setup): what a package needs is read from what is installed here, its
version from constraints/. What the machine has stays as it is wherever setup.py and the packages take its version.
"""

import argparse
import importlib.metadata
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
STACKS = {"3.11": "0.16", "3.12": "0.19", "3.13": "0.19"}  # megatron-core of each Python
# Asked for by megatron-energon and multi-storage-client for object stores, and imported by nothing that runs here.
NOT_IMPORTED = ("s3fs", "aiobotocore", "botocore", "pyroute2", "prettytable", "jmespath", "aioitertools", "mfusepy")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Wheel:
    """One to carry. instead_of: the version that the machine has, and that is not taken; "" if it has none."""

    name: str
    version: str
    instead_of: str = ""


def normal(name: str) -> str:
    """A name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(text: str) -> dict[str, str]:
    """name -> version, of the output of ``pip list --format=freeze``; SystemExit for a line of another form."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, separator, version = line.partition("==")
        if not separator or not version:
            sys.exit(f"'{line}' is no line of pip list --format=freeze (name==version)")
        found[normal(name)] = version
    return found


def pinned(stack: str) -> dict[str, str]:
    """name -> version, of constraints/ for a stack."""
    texts = [
        (ROOT / "constraints" / name).read_text(encoding="utf-8") for name in ("common.txt", f"megatron-{stack}.txt")
    ]
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", "\n".join(texts), re.MULTILINE)}


def asked_for() -> list[str]:
    """What setup.py requires."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    requirements: list[str] = setup.call_args.kwargs["install_requires"]
    return requirements


def missing(machine: dict[str, str], python: str, leave_out: Iterable[str] = ()) -> list[Wheel]:
    """Wheels for a machine that has ``machine``, by name. SystemExit for a package that constraints/ do not know."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    pins, left_out = pinned(STACKS[python]), {normal(name) for name in leave_out}
    found: dict[str, Wheel] = {}
    seen = set()
    waiting = [Requirement(line) for line in asked_for()]
    while waiting:
        one = waiting.pop()
        name = normal(one.name)
        if name in found or name in left_out or (one.marker and not one.marker.evaluate(environment)):
            continue
        has = machine.get(name, "")
        if not (has and one.specifier.contains(has, prereleases=True)):
            if name not in pins:
                sys.exit(f"{one} is needed and constraints/ have no version of {name}")
            found[name] = Wheel(name, pins[name], has)
        if (name, name in found) in seen:  # what it needs has been asked for
            continue
        seen.add((name, name in found))
        try:
            needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            other = name not in found and has != importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed here, so what it needs is not known: run this where make setup has been")
        for need in needs if other else ():  # it stays, and may need other versions than the one here does
            need.specifier = SpecifierSet()
        waiting += needs
    return sorted(found.values(), key=lambda wheel: wheel.name)


def download(wheels: Iterable[Wheel], python: str, folder: Path) -> None:
    """Fetch them by pip, each at its version and without what it needs."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, *platforms, "--dest", str(folder)]
    done = subprocess.run([*command, *(f"{one.name}=={one.version}" for one in wheels)], check=False)
    if done.returncode:
        sys.exit(f"pip download ended with exit code {done.returncode}")


def main(arguments: list[str] | None = None) -> None:
    """Prints the list, with sizes once it is downloaded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("machine", type=Path, help="output of pip list --format=freeze on that machine")
    parser.add_argument("--python", required=True, choices=STACKS, help="its Python")
    parser.add_argument("--leave-out", action="append", default=[], metavar="NAME", help="e.g. av, where no videos are")
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="fetch the wheels into an empty folder")
    options = parser.parse_args(arguments)
    if options.download and options.download.exists() and any(options.download.iterdir()):
        parser.error(f"{options.download} is not empty")
    machine = installed(options.machine.read_text(encoding="utf-8"))
    wheels = missing(machine, options.python, [*NOT_IMPORTED, *options.leave_out])
    for one in wheels:
        print(f"{one.name}=={one.version}" + (f" instead of {one.instead_of}" if one.instead_of else ""))
    print(f"{len(wheels)} wheels; left out: {', '.join([*NOT_IMPORTED, *options.leave_out])}")
    if options.download:
        download(wheels, options.python, options.download)
        files = sorted(options.download.glob("*.whl"), key=lambda file: -file.stat().st_size)
        for file in files:
            print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")
        print(f"{sum(file.stat().st_size for file in files) / 1e6:8.2f} MB  in {len(files)} wheels")


if __name__ == "__main__":
    main()
