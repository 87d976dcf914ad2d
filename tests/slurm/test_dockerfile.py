"""The container has the versions the tests ran with: what setup.py requires, at the pins of constraints.txt."""

import importlib.metadata

import pytest
from packaging.requirements import Requirement
from project import ROOT, constraints, pins, setup_arguments

OF_THE_IMAGE = {"torch", "triton", "numpy"}


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_pins_of_the_dockerfile_are_those_of_setup(dockerfile: str) -> None:
    wanted = pins("\n".join(setup_arguments()["install_requires"]))
    installed = pins("\n".join(line for line in dockerfile.splitlines() if not line.startswith("#")))
    assert len(wanted) > 10
    assert installed == {name: version for name, version in wanted.items() if name not in OF_THE_IMAGE}


def test_the_image_has_the_transformer_engine_of_setup_which_megatron_core_takes(dockerfile: str) -> None:
    said = pins("\n".join(line for line in dockerfile.splitlines() if line.startswith("#")))
    assert said == {name: constraints()[name] for name in ("transformer-engine", "megatron-core")}
    assert f"v.startswith('{said['transformer-engine'].rpartition('.')[0]}.')" in dockerfile, "the build looks, too"
    requirements = map(Requirement, importlib.metadata.requires("megatron-core") or [])
    (taken,) = (wanted.specifier for wanted in requirements if wanted.name == "transformer-engine")
    assert taken.contains(said["transformer-engine"]), taken
