"""What a client that is no browser gets of the page: no file that was not uploaded, no URL fetched, no large body."""

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

pytestmark = pytest.mark.usefixtures("packages")


def send(page: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(page).netloc, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.png"
    file.write_bytes(b"the secret")
    return file


def test_no_route_gives_a_file_that_was_not_uploaded(page: str, secret: Path) -> None:
    inside = Path(__file__).resolve()
    ways = [
        str(secret),
        str(inside),
        "/etc/passwd",
        "..%2f..%2f..%2fetc/passwd",
        "pyproject.toml",
        "/proc/self/environ",
    ]
    ways += [quote(str(secret), safe=""), f"{secret.parent}/x/../secret.png", f"//{secret}", f"file://{secret}"]
    for way in ways:
        for route in (
            "/gradio_api/file=",
            "/file=",
            "/gradio_api/file/",
            "/static/",
            "/assets/",
            "/gradio_api/stream/",
        ):
            status, text = send(page, "GET", f"{route}{way}")
            assert status >= 400 and "the secret" not in text and "root:" not in text, (route, way, status)


def test_nothing_is_fetched_for_a_client(page: str) -> None:
    for url in ("http://127.0.0.1:9/a.png", "https://example.org/a.png", quote("http://127.0.0.1:9/", safe="")):
        for route in ("/gradio_api/proxy=", "/proxy=", "/gradio_api/file=", "/gradio_api/stream/"):
            assert send(page, "GET", f"{route}{url}")[0] >= 400, (route, url)


def joined(page: str, path: str) -> tuple[int, str]:
    """What comes of a question whose file is said to be ``path``: status and all events."""
    config = json.loads(send(page, "GET", "/config")[1])
    number = next(i for i, d in enumerate(config["dependencies"]) if any(t[1] == "submit" for t in d["targets"]))
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    body = {
        "data": [{"text": "?", "files": [file]}],
        "fn_index": config["dependencies"][number]["id"],
        "session_hash": "s",
    }
    status, text = send(page, "POST", "/gradio_api/queue/join", body)
    return (status, text) if status != 200 else send(page, "GET", "/gradio_api/queue/data?session_hash=s")


@pytest.mark.parametrize("path", ["secret", "/etc/passwd", "../../../etc/passwd", "pyproject.toml"])
def test_a_question_about_a_file_that_was_not_uploaded_fails(page: str, secret: Path, path: str) -> None:
    _, text = joined(page, str(secret) if path == "secret" else path)
    assert '"success":false' in text.replace(" ", "") and "the secret" not in text and "root:" not in text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "https://example.org/a.png", "file:///etc/passwd"])
def test_a_url_in_place_of_a_file_is_refused(page: str, url: str) -> None:
    status, text = joined(page, url)
    assert status == 400 and "a URL is given in place of a file" in text


def test_large_bodies_are_refused(page: str) -> None:
    for path, most in (("/gradio_api/queue/join", 1 << 20), ("/gradio_api/upload", 600_000)):
        status, text = send(page, "POST", path, headers={"content-length": "209715200"}, body=b"")
        assert status == 413 and f"209715200 bytes, the limit is {most}" in text


def test_an_upload_too_large_is_refused(page: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(400_000) + b"\r\n--b--\r\n"
    status, _ = send(page, "POST", "/gradio_api/upload", body, {"content-type": "multipart/form-data; boundary=b"})
    assert status == 413


def test_other_names_of_this_machine_and_other_sites_are_refused(page: str) -> None:
    assert send(page, "GET", "/", headers={"host": "rebound.example.org"})[0] == 400


def test_a_page_of_another_site_uploads_nothing(page: str) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    status, text = send(page, "POST", "/gradio_api/upload", body, {**kind, "origin": "https://evil.org"})
    assert status == 403 and "a page of 'https://evil.org' may not ask" in text
    assert send(page, "POST", "/gradio_api/upload", body, {**kind, "origin": page})[0] == 200


def test_every_answer_forbids_the_browser_to_ask_others(page: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(page).netloc, timeout=60)
    connection.request("GET", "/")
    policy = connection.getresponse().getheader("content-security-policy", "")
    assert "default-src 'self'" in policy and "connect-src 'self'" in policy and "http:" not in policy
    connection.close()
