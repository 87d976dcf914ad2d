"""What the tests of packaging share: the pins of both stacks, and what setup.py asks setuptools for."""

import contextlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"\b([a-z0-9][a-z0-9._-]*)(?:\[[a-z]+\])?==([0-9][0-9a-z.]*)", re.IGNORECASE)


def pins(text: str) -> dict[str, str]:
    """name -> version of every ``name==version`` in ``text``; names as PyPI normalises them."""
    return {re.sub(r"[-_.]+", "-", name).lower(): version.rstrip(".") for name, version in PIN.findall(text)}


STACKS = ("0.16", "0.19")  # megatron-core's
THIS_STACK = STACKS[0] if sys.version_info < (3, 12) else STACKS[1]


def constraints(stack: str = THIS_STACK) -> dict[str, str]:
    """The exact versions that a stack was tested with, by default the one of this Python."""
    files = ("common.txt", f"megatron-{stack}.txt")
    return pins("".join((ROOT / "constraints" / name).read_text(encoding="utf-8") for name in files))


def setup_arguments() -> dict[str, Any]:
    """What setup.py calls ``setup`` with."""
    with mock.patch("setuptools.setup") as setup, contextlib.chdir(ROOT):
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs
