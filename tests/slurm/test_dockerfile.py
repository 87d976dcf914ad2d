"""The container has the versions the tests ran with: what setup.py requires, at the pins of the newer stack."""

import pytest
from packaging.requirements import Requirement
from project import ROOT, STACKS, constraints, pins, setup_arguments

OF_THE_IMAGE = {"torch", "triton", "numpy"}
PINNED = constraints(STACKS[1])


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_pins_of_the_dockerfile_are_those_of_setup(dockerfile: str) -> None:
    wanted = {name: PINNED[name] for name in {Requirement(line).name for line in setup_arguments()["install_requires"]}}
    installed = pins("\n".join(line for line in dockerfile.splitlines() if not line.startswith("#")))
    assert len(wanted) > 10
    assert installed == {name: version for name, version in wanted.items() if name not in OF_THE_IMAGE}


def test_the_image_has_a_transformer_engine_that_setup_takes(dockerfile: str) -> None:
    said = pins("\n".join(line for line in dockerfile.splitlines() if line.startswith("#")))
    assert said == {name: PINNED[name] for name in ("transformer-engine", "megatron-core")}
    assert f"v.startswith('{said['transformer-engine'].rpartition('.')[0]}.')" in dockerfile, "the build looks, too"
    (taken,) = (
        one.specifier
        for one in map(Requirement, setup_arguments()["extras_require"]["gpu"])
        if one.name == "transformer-engine" and one.marker and one.marker.evaluate({"python_version": "3.12"})
    )
    assert taken.contains(said["transformer-engine"]), taken
    assert "--ignore-requires-python" not in dockerfile
