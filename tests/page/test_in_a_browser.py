"""The page in Chromium: pictures dropped, tiles and answers seen, several turns, and nobody else asked for anything."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving_cases import expected, png

SECONDS = 60.0
WORDS = "Which <ref>colours</ref>, *now*? ![a](http://example.org/a.png)"  # shown as it is, and fetched by nobody


def wait_for(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    pytest.fail(f"{what} did not come in {SECONDS:.0f} s")


def chats(browser: Any) -> list[str]:
    """The text of each model's column."""
    return browser.execute_script("return [...document.querySelectorAll('.bubble-wrap')].map(e => e.innerText)")


def pictures_of_tiles(browser: Any) -> list[list[int]]:
    """Width and height of each picture of tiles; uploads, which the talk shows too, keep their names."""
    script = "return [...document.querySelectorAll('.image-frame img')].filter(e => e.src.endsWith('/image.png'))"
    return browser.execute_script(script + ".filter(e => e.naturalWidth).map(e => [e.naturalWidth, e.naturalHeight])")


def upload(browser: Any, *files: Path) -> None:
    from selenium.webdriver.common.by import By

    before = len(browser.find_elements(By.CSS_SELECTOR, ".thumbnail-item"))
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys("\n".join(map(str, files)))
    wait_for(
        lambda: len(browser.find_elements(By.CSS_SELECTOR, ".thumbnail-item")) == before + len(files), "the upload"
    )


def ask(browser: Any, words: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element(By.CSS_SELECTOR, "textarea")
    box.send_keys(words)
    box.send_keys(Keys.ENTER)


def hosts(browser: Any) -> set[str]:
    """Every host that the browser has asked, or has tried to ask, since it was started."""
    found = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            if url.scheme in ("http", "https", "ws", "wss"):
                found.add(url.netloc)
    return found


def test_a_talk_about_pictures_with_two_models(browser: Any, page: str, tmp_path: Path) -> None:
    first, second = png((250, 10, 10)), png((10, 10, 250))
    (tmp_path / "red.png").write_bytes(first)
    (tmp_path / "blue.png").write_bytes(second)
    upload(browser, tmp_path / "red.png", tmp_path / "blue.png")
    ask(browser, WORDS)
    whole = expected(WORDS, first, second)
    seen: list[set[str]] = [set(), set()]

    def both() -> bool:
        now = chats(browser)
        for texts, text in zip(seen, now, strict=True):
            texts.add(text)
        return all(whole in text for text in now)

    wait_for(both, "the answers")
    beginning = whole[: whole.index("[") + 1]
    growing = [[text for text in texts if beginning in text and whole not in text] for texts in seen]
    assert all(len(texts) > 1 for texts in growing), "no answer was seen growing"
    sizes = wait_for(lambda: len(pictures_of_tiles(browser)) == 2 and pictures_of_tiles(browser), "the tiles")
    assert sizes[0] == sizes[1] and sizes[0][1] > 2 * 32, "a row for each picture"
    ask(browser, "And now?")
    again = expected("And now?", first, second)  # the pictures of the first turn are still read
    wait_for(lambda: all(again in text and whole in text for text in chats(browser)), "the second turn")
    found = hosts(browser)
    assert found == {urlsplit(page).netloc}


def test_a_broken_file_is_shown_as_refused_and_the_talk_goes_on(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(png((1, 1, 1))[:20])
    upload(browser, tmp_path / "broken.png")
    ask(browser, "What is it?")
    wait_for(lambda: all("Refused: broken.png is no picture" in text for text in chats(browser)), "the refusal")
    ask(browser, "Hello?")
    wait_for(lambda: all(expected("Hello?") in text for text in chats(browser)), "the answer")


def test_start_again_forgets(browser: Any) -> None:
    from selenium.webdriver.common.by import By

    ask(browser, "One?")
    wait_for(lambda: all(expected("One?") in text for text in chats(browser)), "the answer")
    browser.find_element(By.XPATH, "//button[contains(., 'Start again')]").click()
    wait_for(lambda: not any("One?" in text for text in chats(browser)), "an empty page")
