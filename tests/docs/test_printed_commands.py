"""Every command that is printed - in README, docs, examples, batch scripts and behind --help - is one that there is.

Each ``megatron-eagle`` line is taken through the command line's own parser, its recipe is read with its overrides; make
targets and scripts exist; links between pages lead somewhere. What the commands do is tested where they are built.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

from megatron_eagle.cli import _parse, command_line
from megatron_eagle.cli.common import Parser
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.config.shipped import shipped_recipes
from megatron_eagle.curation.plan import load_plan

pytestmark = pytest.mark.unit
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PAGES += sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".md", ".yaml"))
PAGES += sorted((ROOT / "slurm").rglob("*.yaml"))
# A word in capitals stands for what the reader has; only a line without one can be read as it stands.
PLACEHOLDER = re.compile(r"(^|[/=])[A-Z][A-Z_]+\b|\.\.\.|[<>$|\[\]]")


def printed_lines() -> Iterator[tuple[str, str]]:
    """(where, line) of every line that begins with a command, also in comments and behind a prompt."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if page.suffix == ".md" else [text]
        for line in "".join(blocks).splitlines():
            yield page.relative_to(ROOT).as_posix(), re.sub(r"^[\s#$`-]*", "", line)
    for where, parser in verbs(command_line(), "megatron-eagle"):
        for line in re.sub(r"\\\n\s*", " ", parser.epilog or "").splitlines():
            yield f"{where} --help", line.strip()


def verbs(parser: Parser, name: str) -> Iterator[tuple[str, Parser]]:
    yield name, parser
    for verb, below in parser.below.items():
        yield from verbs(below, f"{name} {verb}")


def commands() -> list[tuple[str, list[str]]]:
    """(where, arguments) of every ``megatron-eagle`` command without a placeholder."""
    found = []
    for where, line in printed_lines():
        if not line.startswith("megatron-eagle ") or PLACEHOLDER.search(re.sub(r"'[^']*'", "", line.split("#")[0])):
            continue
        words = shlex.split(line.split("`")[0], comments=True)[1:]
        if words and not words[0].startswith("'"):
            found.append((where, words))
    return found


def test_every_printed_command_is_one_that_there_is() -> None:
    wrong, read = [], 0
    for where, words in commands():
        try:
            options = _parse(words)
            read += 1
            check_recipe(options)
        except (SystemExit, Exception) as error:  # noqa: BLE001  all that is wrong is said at once
            if not isinstance(error, SystemExit) or error.code:
                wrong.append(f"{where}: {' '.join(words)}: {error!r}")
    assert wrong == []
    assert read >= 60, f"{read} commands were found: are they written in another way now?"


def check_recipe(options: argparse.Namespace) -> None:
    """A recipe, or a plan of a curation, is read where it comes along; one of the reader's cannot be."""
    recipe = getattr(options, "recipe", None)
    if isinstance(recipe, Path) and (str(recipe) in shipped_recipes() or (ROOT / recipe).is_file()):
        load_recipe(recipe if str(recipe) in shipped_recipes() else ROOT / recipe, getattr(options, "overrides", ()))
    plan = getattr(options, "plan", None)
    if isinstance(plan, Path) and "examples" in plan.parts:
        load_plan(ROOT / Path(*plan.parts[plan.parts.index("examples") :]))


def test_every_verb_has_an_example_of_itself() -> None:
    for name, parser in verbs(command_line(), "megatron-eagle"):
        if not parser.below:
            assert f"{name} " in f"{parser.epilog} " or name.removesuffix(" run") in str(parser.epilog), name


def test_make_targets_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for where, line in printed_lines():
        wrong += [f"{where}: make {name}" for name in re.findall(r"(?:^|`)make ([a-z-]+)", line) if name not in targets]
        scripts = re.findall(r"(?:^|`)python ((?:tools|benchmarks|tests)/[\w/]+\.py)", line)
        wrong += [f"{where}: {script}" for script in scripts if not (ROOT / script).is_file()]
    assert wrong == []


def test_links_between_pages_lead_somewhere() -> None:
    wrong = []
    for page in (page for page in PAGES if page.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            found = (page.parent / path).resolve() if path else page
            if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
                wrong.append(f"{page.name}: {target}")
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
