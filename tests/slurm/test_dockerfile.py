"""The container has the versions the tests ran with: pins of the Dockerfile equal those of setup.py."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OF_THE_IMAGE = {"torch", "triton", "numpy"}
PIN = re.compile(r"\b([a-z0-9][a-z0-9._-]*)(?:\[[a-z]+\])?==([0-9][0-9a-z.]*)")


def pins(text: str) -> dict[str, str]:
    return {name: version.rstrip(".") for name, version in PIN.findall(text)}


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_pins_of_the_dockerfile_are_those_of_setup(dockerfile: str) -> None:
    listed = re.search(r"^TRAINER = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    wanted = pins(listed[1])
    installed = pins("\n".join(line for line in dockerfile.splitlines() if not line.startswith("#")))
    assert len(wanted) > 10
    assert installed == {name: version for name, version in wanted.items() if name not in OF_THE_IMAGE}


def test_the_image_has_the_transformer_engine_of_setup_which_megatron_core_takes(dockerfile: str) -> None:
    setup = pins((ROOT / "setup.py").read_text())
    said = pins("\n".join(line for line in dockerfile.splitlines() if line.startswith("#")))
    assert said == {name: setup[name] for name in ("transformer-engine", "megatron-core")}
    assert f"v.startswith('{said['transformer-engine'].rpartition('.')[0]}.')" in dockerfile, "the build looks, too"
    requirements = map(Requirement, importlib.metadata.requires("megatron-core") or [])
    (taken,) = (wanted.specifier for wanted in requirements if wanted.name == "transformer-engine")
    assert taken.contains(said["transformer-engine"]), taken
