"""Commands of a page's code blocks, run as they are printed: what a reader copies is what a test types.

A command of a recipe may get overrides for a small size; what stands for the network or the set-up is passed over
by name.
"""

import contextlib
import io
import os
import re
import shlex
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest
from worlds import World, WorldError

NOT_RUN = ("git clone", "cd ", "make setup", "source ", "pip install", "hf download")
IN_A_WORLD = ("train", "evaluate")  # what lays its process groups and signals into the process that runs it


def commands(page: Path, heading: str | None = None) -> list[str]:
    """The lines of a page's code blocks, without prompts and comments; of the part under ``heading`` alone if given."""
    text = page.read_text(encoding="utf-8")
    if heading is not None:
        _, found, text = text.partition(f"\n{heading}\n")
        assert found, f"{page} has no heading {heading!r}"
        text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    return [line for line in lines if line.strip()]


def type_in(lines: Sequence[str], folder: Path, world: World, changes: Mapping[str, Sequence[str]]) -> list[str]:
    """Run each line in ``folder``; what each printed. changes: overrides, by the recipe that a command names."""
    printed = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if line.startswith(NOT_RUN):
            printed.append("")
            continue
        assert words[0] == "megatron-eagle", f"{line!r} is no command that this test can type"
        arguments = [*words[1:], *(change for name in words for change in changes.get(name, ()))]
        try:
            if words[1] in IN_A_WORLD:
                (said,) = world.run(run_verb, str(folder), arguments)
            else:
                said = run_verb(str(folder), arguments)
        except (WorldError, AssertionError) as error:
            pytest.fail(f"{line}\n{error}")
        printed.append(said)
    return printed


def run_verb(folder: str, arguments: list[str]) -> str:
    """One verb in this process, in ``folder``; what it printed. AssertionError with it unless it ends with 0."""
    from megatron_eagle.cli import main

    code: object = None
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
        except Exception:  # noqa: BLE001  said with all that the verb had printed
            code = traceback.format_exc()
    assert code == 0, f"megatron-eagle {' '.join(arguments)} ended with {code}:\n{said.getvalue()}"
    return said.getvalue()
