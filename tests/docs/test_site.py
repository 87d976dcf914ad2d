"""The documentation as a site: every page is in its navigation, every link leads to a file of the site, and what
``make docs`` builds fetches nothing from elsewhere. Only the last needs MkDocs."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from project import ROOT

SITE = runpy.run_path(str(ROOT / "tools" / "docs_site.py"))
# What a browser fetches to show a page.
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")


def pages() -> list[str]:
    """Without the dated reports, which are in no navigation."""
    return [name for name in SITE["site_files"]() if name.endswith(".md") and not name.startswith("benchmarks/")]


def navigation() -> list[str]:
    """The pages that mkdocs.yml names, in order."""
    # Its tags name Python objects of MkDocs' extensions, which are not needed here.
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)

    def flat(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [name for value in values for name in flat(value)]

    return flat(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), loader)["nav"])


def test_every_page_is_in_the_navigation_once() -> None:
    named = navigation()
    assert named[0] == "README.md"
    assert sorted(named) == sorted(pages())
    assert len(named) > 30


def test_links_lead_to_files_of_the_site() -> None:
    """tests/docs/test_printed_commands.py looks whether they are there, and at anchors."""
    shown, wrong = set(SITE["site_files"]()), []
    for page in pages():
        for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", (ROOT / page).read_text(encoding="utf-8")):
            where = os.path.normpath(Path(page).parent / target)
            if "://" not in target and where not in shown:
                wrong.append(f"{page}: {target}")
    assert wrong == []


@pytest.fixture(scope="module")
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of a process that has MkDocs."""
    folder = request.config.getoption("--docs-packages")
    found = os.environ | {"PYTHONPATH": str(Path(folder).absolute()) if folder else "", "NO_MKDOCS_2_WARNING": "1"}
    if subprocess.run([sys.executable, "-c", "import material"], env=found, capture_output=True).returncode:
        pytest.skip("make docs runs this: MkDocs is not installed")
    return found


def test_it_is_built_without_a_warning_and_fetches_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = {file.relative_to(tmp_path / "site").as_posix(): file for file in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "docs/install.html", "examples/finetune/index.html"} <= built.keys()
    assert {name: FETCHED.findall(file.read_text(encoding="utf-8")) for name, file in built.items()} == dict.fromkeys(
        built, []
    )
    assert all("iframe-worker.js" in file.read_text(encoding="utf-8") for file in built.values())
