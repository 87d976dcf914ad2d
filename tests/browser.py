"""A page in Debian's Chromium without a window, asked by a script of the test's: what it would show at some width."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"
# Windows cannot be as narrow as a telephone, frames can; the clock runs ahead until the page has answered.
FLAGS += " --virtual-time-budget=3000"
FRAME = """<!doctype html><script>
addEventListener("message", event => document.documentElement.dataset.said = event.data)
</script><iframe src="asked.html" style="width: {width}px; height: 900px; border: 0"></iframe>"""
# Pixels by which the page is wider than its window, and texts that stick out of boxes that neither wrap nor scroll.
OVERFLOW = """
  const page = document.documentElement;
  const sticking = [...document.querySelectorAll("main *")].filter(one => {
    for (let box = one; box; box = box.parentElement) if (getComputedStyle(box).overflowX !== "visible") return false;
    return one.getBoundingClientRect().right > page.clientWidth + 1;
  });
  return [innerWidth, page.scrollWidth - page.clientWidth, sticking.map(one => one.outerHTML.slice(0, 80))];
"""


def ask_page(page: Path, script: str, folder: Path, *, width: int = 1280) -> Any:
    """What ``script``, the body of a function, returns in the page; skips the test where there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here (Debian's package chromium)")
    asking = f"<script>parent.postMessage(JSON.stringify((() => {{{script}}})()), '*')</script>"
    asked, frame = folder / "asked.html", folder / "frame.html"
    asked.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{asking}</body>"), encoding="utf-8")
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    command = [chromium, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r'data-said="([^"]*)"', done.stdout)
    assert said is not None, "the page's script failed"
    return json.loads(said[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def assert_fits(page: Path, folder: Path) -> None:
    """Nothing of the page sticks out of a window of 400 pixels, nor of one of 1280."""
    for width in (400, 1280):
        inner, over, sticking = ask_page(page, OVERFLOW, folder, width=width)
        assert (inner, over, sticking) == (width, 0, []), f"{page.name} at {width}: {inner}, {over}, {sticking}"
