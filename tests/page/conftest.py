"""Fixtures of the page: Gradio from a folder of its own, a page over two stand-in models, and a browser that counts."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1600"


@pytest.fixture(scope="session")
def packages(request: pytest.FixtureRequest) -> None:
    """What the page needs beside the trainer (constraints/serve.txt)."""
    folder = request.config.getoption("--page-packages")
    if folder:
        sys.path.append(folder)
    pytest.importorskip("gradio", reason="make test-page runs this: Gradio is not installed")


@pytest.fixture(scope="session")
def page(packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with two models, one slower than the other."""
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    from serving_cases import Echo, served

    from megatron_eagle.serving.conversation import Options
    from megatron_eagle.serving.limits import Limits
    from megatron_eagle.serving.page import build_page
    from megatron_eagle.serving.worker import Worker

    limits = Limits(body_bytes=300_000)
    workers = [Worker(Echo("first", 0.3), limits), Worker(Echo("second", 0.4), limits)]
    with served(build_page(workers, Options())) as address:
        yield address


@pytest.fixture
def browser(page: str, tmp_path: Path) -> Iterator[Any]:
    """A new Chromium that has opened the page."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here (Debian's packages chromium and chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.implicitly_wait(20)
    driver.get(page)
    yield driver
    driver.quit()
