"""What the tests of packaging share: the pins of constraints.txt, and what setup.py asks setuptools for."""

import contextlib
import re
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"\b([a-z0-9][a-z0-9._-]*)(?:\[[a-z]+\])?==([0-9][0-9a-z.]*)", re.IGNORECASE)


def pins(text: str) -> dict[str, str]:
    """name -> version of every ``name==version`` in ``text``; names as PyPI normalises them."""
    return {re.sub(r"[-_.]+", "-", name).lower(): version.rstrip(".") for name, version in PIN.findall(text)}


def constraints() -> dict[str, str]:
    """The one place where versions are pinned."""
    return pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def setup_arguments() -> dict[str, Any]:
    """What setup.py calls ``setup`` with."""
    with mock.patch("setuptools.setup") as setup, contextlib.chdir(ROOT):
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs
