"""What may import what: packages import from those below them only, as docs/architecture.md draws it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_eagle"

# From the bottom up. A package imports itself and what stands above it in this list, nothing below.
ORDER = (
    "remote_code",  # what an exported folder carries, which therefore imports nothing of this project
    "errors",
    "progress",
    "importing",
    "text",
    "pages",
    "config",
    "compat",
    "data",
    "parallel",
    "model",
    "checkpoint",
    "training",
    "planning",
    "measuring",
    "dry_run",
    "verification",
    "conversion",
    "endpoint",
    "evaluation",
    "serving",
    "curation",
    "cluster",
    "runs",
    "demo",
    "gpu_day",
    "cli",
)
DATA_ORDER = ("media", "sample", "storage", "order", "stream", "build", "reports")


def imported_modules(file: Path) -> set[str]:
    """Every megatron_eagle module that ``file`` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            if node.module == "megatron_eagle":
                found |= {f"megatron_eagle.{name.name}" for name in node.names}
    return {name for name in found if name.startswith("megatron_eagle.")}


def upward(files: list[Path], order: tuple[str, ...], part: int) -> list[str]:
    """Imports that go up: ``part`` says which component of the dotted name is looked up in ``order``."""
    wrong = []
    for file in files:
        own = file.relative_to(PACKAGE).with_suffix("").parts
        if len(own) < part or own[part - 1] not in order:
            continue
        for name in sorted(imported_modules(file)):
            parts = name.split(".")
            if parts[1:part] != list(own[: part - 1]) or len(parts) <= part or parts[part] not in order:
                continue
            if order.index(parts[part]) > order.index(own[part - 1]):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


def drawn(kind: str) -> tuple[str, ...]:
    """Packages of one picture of docs/architecture.md, from the bottom up."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page.split(f"```{kind}\n")[1].split("```")[0].splitlines()
    return tuple(line.split()[0] for line in reversed(lines))


def test_the_page_draws_this_order() -> None:
    assert drawn("packages") == ORDER
    assert drawn("data-packages") == DATA_ORDER


def test_the_page_has_a_paragraph_for_each_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    described = re.findall(r"^\*\*`(\w+)`\*\* - ", page, re.MULTILINE)
    assert tuple(sorted(described)) == tuple(sorted(ORDER))


def test_every_package_has_its_place() -> None:
    present = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    present |= {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert present == set(ORDER)


def test_exported_code_imports_nothing_of_the_project() -> None:
    files = sorted((PACKAGE / "remote_code").glob("*.py"))
    assert len(files) > 5 and [file.name for file in files if imported_modules(file)] == []


@pytest.mark.parametrize(("order", "part"), [(ORDER, 1), (DATA_ORDER, 2)], ids=["packages", "data"])
def test_no_import_goes_up(order: tuple[str, ...], part: int) -> None:
    assert upward(FILES, order, part) == []
