"""The container has the versions the tests ran with: pins of the Dockerfile equal those of setup.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_THE_IMAGE = {"torch", "triton", "numpy"}
PIN = re.compile(r"\b([a-z0-9][a-z0-9._-]*)==([0-9][0-9a-z.]*)")


def test_pins_of_the_dockerfile_are_those_of_setup() -> None:
    listed = re.search(r"^TRAINER = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    wanted = dict(PIN.findall(listed[1]))
    found = dict(PIN.findall((ROOT / "Dockerfile").read_text()))
    assert len(wanted) > 10
    assert found == {name: version for name, version in wanted.items() if name not in OF_THE_IMAGE}
