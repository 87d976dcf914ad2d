"""Versions are pinned in constraints/ alone: every other mention equals them, and so does what is installed.

setup.py asks for ranges, which hold the pins of the stack that each Python has.

What is required is imported, and what is imported is required.
"""

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from project import ROOT, STACKS, THIS_STACK, constraints, pins, setup_arguments

import megatron_eagle
from megatron_eagle.compat.versions import KNOWN_MEGATRON

OF_THE_GPU = {"nvidia-dali-cuda130", "transformer-engine"}  # the extra "gpu"
OPTIONAL = {"mlflow", "wandb"}  # looked for where a recipe asks for it, see training/dashboards.py
BESIDE = {"vllm", "lmms-eval"}  # call our plug-ins where both are installed; constraints/vllm.txt, lmms.txt
# Modules whose first name does not tell the distribution, longest first.
DISTRIBUTIONS = {
    "faiss": "faiss-cpu",
    "megatron.core": "megatron-core",
    "megatron.energon": "megatron-energon",
    "nvidia.dali": "nvidia-dali-cuda130",
    "torch.utils.tensorboard": "tensorboard",
}
OURS = {"megatron_eagle", "eagle_kernels"}
TEXTS = [
    ROOT / "README.md",
    ROOT / "Dockerfile",
    ROOT / "kernels" / "README.md",
    *(file for file in sorted((ROOT / "docs").glob("*.md")) if file.name != "decisions.md"),  # that one is dated
    *sorted((ROOT / "megatron_eagle").rglob("*.py")),
]


PYTHONS = {"0.16": "3.11", "0.19": "3.12"}


def required(requirements: list[str], stack: str = THIS_STACK) -> dict[str, Requirement]:
    """name -> what is asked for where ``stack`` is the one."""
    parsed = [Requirement(line) for line in requirements]
    machine = {"python_version": PYTHONS[stack], "platform_system": "Linux", "platform_machine": "x86_64"}
    return {one.name: one for one in parsed if one.marker is None or one.marker.evaluate(machine)}


def names(requirements: list[str]) -> set[str]:
    return set(required(requirements))


@functools.cache
def distributions_by_module() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def imported(file: Path) -> set[str]:
    """Distributions that ``file`` imports something of, other than Python's own and ours."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    by_module = distributions_by_module()
    found = set()
    for module in modules:
        top = module.partition(".")[0]
        longer = [name for start, name in DISTRIBUTIONS.items() if f"{module}.".startswith(f"{start}.")]
        if longer:
            found |= set(longer)
        elif top not in sys.stdlib_module_names and top not in OURS and top not in ("megatron", "nvidia"):
            found.add(by_module.get(top, [top])[0].lower().replace("_", "-"))
    return found


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {
        name.lower().replace("_", "-"): version.partition("+")[0]
        for name, version in ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    }
    wanted = {name: version for name, version in constraints().items() if name not in OF_THE_GPU}
    for_cuda = {name for name in wanted if name.startswith(("nvidia-", "cuda-"))}
    if not for_cuda & installed.keys():  # PyTorch's build for a CPU
        wanted = {name: version for name, version in wanted.items() if name not in for_cuda}
    if "triton" not in installed:  # where it has no wheels
        del wanted["triton"]
    assert {name: installed.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("stack", STACKS)
def test_what_setup_asks_for_holds_the_pins_of_each_stack(stack: str) -> None:
    arguments = setup_arguments()
    asked = required([*arguments["install_requires"], *sum(arguments["extras_require"].values(), [])], stack)
    pinned = constraints(stack)
    for beside in ("serve.txt", "ray.txt", "docs.txt", "quantised.txt"):
        pinned |= pins((ROOT / "constraints" / beside).read_text(encoding="utf-8"))
    assert len(asked) > 25
    assert {name: pinned.get(name) for name, one in asked.items() if not one.specifier.contains(pinned[name])} == {}
    assert asked["megatron-core"].specifier == f"=={pinned['megatron-core']}"


def test_the_lower_ends_are_the_oldest_versions_tested() -> None:
    asked = required(setup_arguments()["install_requires"], STACKS[1])
    lowest = pins((ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8"))
    assert len(lowest) == 6
    for name, version in lowest.items():
        (lower,) = (one.version for one in asked[name].specifier if one.operator == ">=")
        assert version in (lower, f"{lower}.0"), name


def test_the_stacks_differ_in_megatron_and_what_comes_for_cuda_alone() -> None:
    older, newer = (constraints(stack) for stack in STACKS)
    differing = {name for name in older.keys() | newer.keys() if older.get(name) != newer.get(name)}
    assert {name for name in differing if not name.startswith(("nvidia-", "cuda-"))} == {
        "megatron-core",
        "transformer-engine",
    }


def test_what_is_required_is_imported_and_the_other_way_round() -> None:
    arguments = setup_arguments()
    files = [*(ROOT / "megatron_eagle").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    used = set().union(*map(imported, files))
    needed = names(arguments["install_requires"])
    optional = ("gpu", "documents", "curate", "endpoint", "lora", "quantised", "ray", "s3", "serve")
    extras = set().union(*(names(arguments["extras_require"][extra]) for extra in optional))
    assert needed - used == set(), "required, and not imported"
    assert used - needed - extras - OPTIONAL - BESIDE == set(), "imported, not required"


def test_this_projects_version_and_python_are_said_once_and_the_same() -> None:
    arguments = setup_arguments()
    assert arguments["version"] == megatron_eagle.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == megatron_eagle.__version__
    assert arguments["python_requires"] == ">=3.11,<3.14"
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'python_version = "3.11"' in settings and 'target-version = "py311"' in settings
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()


def test_the_kernels_own_distribution_says_what_the_trainer_says() -> None:
    kernels = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    trainer = setup_arguments()
    assert kernels["version"] == trainer["version"]
    assert kernels["requires-python"] == trainer["python_requires"]
    assert kernels["license"] == trainer["license_expression"]
    assert {one.partition(">")[0] for one in kernels["dependencies"]} == {"torch", "triton"}
    assert set(kernels["dependencies"]) <= set(trainer["install_requires"])
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_private_names_are_those_of_the_pinned_versions() -> None:
    assert {constraints(stack)["megatron-core"] for stack in STACKS} == set(KNOWN_MEGATRON)
    interpreter = (ROOT / "kernels" / "eagle_kernels" / "checking" / "interpreter.py").read_text(encoding="utf-8")
    tested = re.search(r"^TESTED_TRITON = (\(.+\))$", interpreter, re.MULTILINE)  # importing it would import Triton
    lowest = pins((ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8"))
    assert tested is not None
    oldest, newest = ast.literal_eval(tested[1])
    assert lowest["triton"].startswith(oldest) and constraints()["triton"].startswith(newest)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_versions_in_texts_are_the_pinned_ones(file: Path) -> None:
    pinned = [constraints(stack) for stack in STACKS]
    text = file.read_text(encoding="utf-8")
    said = re.findall(r"\b([a-z][a-z-]+)(?:==| )(\d+\.\d+\.\d+)\b", text)
    either = {name: {stack.get(name) for stack in pinned} for name, _ in said}
    wrong = [(name, version) for name, version in said if either[name] != {None} and version not in either[name]]
    assert wrong == []
