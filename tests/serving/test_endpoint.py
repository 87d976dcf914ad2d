"""The endpoint over real HTTP: answers whole and in pieces, 50 clients at once, and what is refused, and why."""

import base64
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from serving_cases import Echo, expected, png, served

from megatron_eagle.cli import main
from megatron_eagle.errors import UserError
from megatron_eagle.serving.borders import is_local
from megatron_eagle.serving.conversation import Options, question
from megatron_eagle.serving.endpoint import build_app
from megatron_eagle.serving.fetching import Fetcher, check_prefix, is_public
from megatron_eagle.serving.limits import Limits, Refused
from megatron_eagle.serving.openai_form import read_request
from megatron_eagle.serving.worker import Worker

LIMITS = Limits(body_bytes=300_000, images=3, new_tokens=1000, stored_bytes=250_000)
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    worker = Worker(Echo(), LIMITS)
    with served(build_app(worker, Fetcher((), LIMITS.body_bytes))) as found:
        yield found
    worker.close()


def send(address: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """(status, body) of a request; a body that is no bytes goes as JSON."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers or JSON)
        answer = connection.getresponse()
        text = answer.read().decode()
        streamed = answer.getheader("content-type", "").startswith("text/event-stream")
        return answer.status, text if streamed or not text.startswith("{") else json.loads(text)
    finally:
        connection.close()


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def ask(words: str, *parts: Any, **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": words}]
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **more}


def refused(address: str, body: Any, *, status: int = 400) -> dict[str, Any]:
    found, answer = send(address, "POST", "/v1/chat/completions", body)
    assert found == status, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]


def pieces(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_lists_the_one_there_is(address: str) -> None:
    status, models = send(address, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == ["echo"]


def test_a_whole_answer_has_its_text_and_its_tokens(address: str) -> None:
    data = png((1, 2, 3))
    shown = picture(data)
    shown["image_url"]["detail"] = "high"
    status, answer = send(address, "POST", "/v1/chat/completions", ask("What?", shown, n=1, user="me"))
    assert status == 200 and answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected("What?", data)}
    assert choice["finish_reason"] == "stop"
    tokens = answer["usage"]
    assert tokens["total_tokens"] == tokens["prompt_tokens"] + tokens["completion_tokens"] > 0


def test_a_streamed_answer_comes_in_pieces(address: str) -> None:
    body = ask("What?", stream=True, stream_options={"include_usage": True})
    status, text = send(address, "POST", "/v1/chat/completions", body)
    found = pieces(text)
    assert status == 200 and len({piece["id"] for piece in found}) == 1
    deltas = [piece["choices"][0]["delta"].get("content", "") for piece in found if piece["choices"]]
    assert "".join(deltas) == expected("What?") and len(deltas) > 3
    assert found[-2]["choices"][0]["finish_reason"] == "stop" and found[-1]["usage"]["completion_tokens"] > 0


def test_fifty_clients_at_once_get_their_own_answers(address: str) -> None:
    answers: dict[int, str] = {}

    def client(number: int) -> None:
        data = png((number, 0, 255 - number))
        body = ask(f"question {number}", picture(data), stream=number % 2 == 0)
        status, answer = send(address, "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        if number % 2:
            answers[number] = answer["choices"][0]["message"]["content"]
        else:
            answers[number] = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces(answer))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: expected(f"question {number}", png((number, 0, 255 - number))) for number in range(50)}


def test_a_file_is_uploaded_once_and_asked_about(address: str) -> None:
    data = png((9, 9, 9))
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--b\r\nContent-Disposition: '
    form += b'form-data; name="file"; filename="../../x.png"\r\n\r\n' + data + b"\r\n--b--\r\n"
    status, file = send(address, "POST", "/v1/files", form, {"content-type": "multipart/form-data; boundary=b"})
    assert status == 200 and file["bytes"] == len(data)
    for _ in range(2):
        body = ask("Again?", {"type": "file", "file": {"file_id": file["id"]}})
        _, answer = send(address, "POST", "/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"] == expected("Again?", data)
    assert send(address, "DELETE", f"/v1/files/{file['id']}")[1]["deleted"]
    error = refused(address, ask("?", {"type": "file", "file": {"file_id": file["id"]}}), status=404)
    assert error["code"] == "file_not_found"
    assert refused(address, ask("?", {"type": "file", "file": {"file_id": "../../etc/passwd"}}), status=404)


def test_uploads_are_limited_together(address: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    _, first = send(address, "POST", "/v1/files", head + bytes(200_000) + b"\r\n--b--\r\n", kind)
    status, answer = send(address, "POST", "/v1/files", head + bytes(60_000) + b"\r\n--b--\r\n", kind)
    assert status == 413 and "60000 bytes and 200000 are kept" in answer["error"]["message"]
    send(address, "DELETE", f"/v1/files/{first['id']}")


REFUSED = {
    "what is not supported": (ask("?", n=2), "unsupported_value", "n=2 is not supported"),
    "an unknown key": (ask("?", guided_json={}), "unsupported_parameter", "'guided_json'"),
    "an answer too long": (
        ask("?", max_tokens=1001),
        "too_many_new_tokens",
        "1001 tokens was asked for, the limit is 1000",
    ),
    "too many pictures": (
        ask("?", *[picture(png((1, 1, 1)))] * 4),
        "too_many_images",
        "4 images in one request, the limit is 3",
    ),
    "a URL": (
        ask("?", {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}),
        "url_refused",
        "no --allow-url",
    ),
    "a file URL": (
        ask("?", {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        "url_refused",
        "refused",
    ),
    "no base64": (
        ask("?", {"type": "image_url", "image_url": {"url": "data:;base64,$$"}}),
        "invalid_base64",
        "not base64",
    ),
    "an unknown part": (ask("?", {"type": "input_audio"}), "invalid_part", "input_audio"),
    "an unknown key of a part": (
        ask("?", {"type": "image_url", "image_url": {"url": "data:;base64,AA=="}, "uuid": "7"}),
        "unsupported",
        "messages[0].content[0] has uuid, which is not supported",
    ),
    "an unknown key of a picture": (
        ask("?", {"type": "image_url", "image_url": {"url": "data:;base64,AA==", "crop": 1}}),
        "unsupported",
        "messages[0].content[0].image_url has crop",
    ),
    "an unknown key of the stream": (
        ask("?", stream=True, stream_options={"include_obfuscation": True}),
        "unsupported",
        "stream_options has include_obfuscation",
    ),
    "a seed too large": (ask("?", seed=2**70), "invalid_value", "this one needs 72"),
    "a temperature too large": (ask("?", temperature=10**400), "invalid_value", "too large"),
    "no messages": ({"model": "echo", "messages": []}, "invalid_value", "at least one message"),
    "a wrong type": (ask("?", temperature="hot"), "invalid_type", "temperature"),
    "a list": ([], "invalid_json", "JSON object"),
    "no JSON": (b"{", "invalid_json", "not JSON"),
    "a deep one": (b"[" * 100_000, "invalid_json", "not JSON"),
    "a broken picture": (ask("?", picture(b"no")), "invalid_request", "image 1 is no picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(address: str, case: str) -> None:
    body, code, words = REFUSED[case]
    error = refused(address, body)
    assert error["code"] == code and words in error["message"] and len(error["message"]) < 500


def test_another_model_is_not_found(address: str) -> None:
    assert refused(address, {**ask("?"), "model": "gpt-5"}, status=404)["code"] == "model_not_found"


def test_a_large_body_is_refused_before_it_is_read(address: str) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(address).port)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 209715200\r\n\r\n{"
        )
        answer = ""
        while "limit is" not in answer and (more := client.recv(4096).decode()):
            answer += more
    assert " 413 " in answer and "the request has 209715200 bytes, the limit is 300000" in answer


def test_a_body_of_unknown_length_is_refused_at_the_limit(address: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    chunks = (b'{"a": "' if number == 0 else b"x" * 65536 for number in range(6))
    connection.request("POST", "/v1/chat/completions", chunks, JSON, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and b"more than 300000 bytes" in answer.read()
    connection.close()


def test_a_web_page_cannot_reach_it(address: str) -> None:
    """Not by a name that was made to mean this machine, and not by a form, which browsers send without asking."""
    status, _ = send(address, "GET", "/v1/models", headers={"host": "rebound.example.org"})
    assert status == 400
    status, answer = send(address, "POST", "/v1/chat/completions", ask("?"), {"content-type": "text/plain"})
    assert status == 415 and "application/json" in answer["error"]["message"]


def test_a_client_that_leaves_frees_the_model_for_the_next() -> None:
    worker = Worker(Echo(pause=0.05), Limits())
    with served(build_app(worker, Fetcher((), 1000))) as address:
        with socket.create_connection(("127.0.0.1", urlsplit(address).port)) as client:
            body = json.dumps(ask("x" * 2000, stream=True)).encode()  # 20 seconds
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert b"200 OK" in client.recv(4096)
        status, answer = send(address, "POST", "/v1/chat/completions", ask("next"))
        assert status == 200 and answer["choices"][0]["message"]["content"] == expected("next")
    worker.close()


@pytest.mark.parametrize("limits", [Limits(waiting=1), Limits(waiting_bytes=150)])
def test_a_full_queue_is_refused(limits: Limits) -> None:
    worker = Worker(Echo(pause=0.2), limits)
    body = ask("a long question", picture(png((1, 2, 3))))
    assert 75 < len(png((1, 2, 3))) < 150
    with served(build_app(worker, Fetcher((), 1000))) as address:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(send(address, "POST", "/v1/chat/completions", body)[0]))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 429} and len(statuses) == 6
    worker.close()


class TestFetching:
    """URLs: only below a prefix, only from the internet, without following where a server points to."""

    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1%eth0"]
        + ["::ffff:127.0.0.1", "fc00::1", "224.0.0.1", "100.64.0.1"],
    )
    def test_addresses_that_are_not_of_the_internet(self, address: str) -> None:
        assert not is_public(address)

    def test_addresses_of_the_internet(self) -> None:
        assert is_public("93.184.215.14") and is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")

    @pytest.mark.parametrize(
        "name", ["http://localhost/a", "http://127.0.0.1/a", "http://[::1]/a", "http://2130706433/a"]
    )
    def test_this_machine_is_refused_even_if_it_was_allowed(self, name: str) -> None:
        with pytest.raises(Refused, match="not an address of the internet|has no address"):
            Fetcher((name,), 1000).for_request()(name)

    @pytest.mark.parametrize(
        "url",
        [
            "https://images.org.evil.org/public/a.png",
            "https://images.org@evil.org/public/a.png",
            "http://images.org/public/a.png",
            "https://images.org:444/public/a.png",
            "https://images.org/private/a.png",
            "https://images.org/public/../private/a.png",
            "https://images.org/public/%2e%2e/private/a.png",
            "https://[",
        ],
    )
    def test_a_prefix_allows_nothing_beside_it(self, url: str) -> None:
        with pytest.raises(Refused, match="no --allow-url covers it|cannot be read as one"):
            Fetcher(("https://images.org/public/",), 1000).for_request()(url)

    def test_what_is_allowed_is_fetched_up_to_a_size(self, address: str) -> None:
        def fetch(path: str, most: int) -> bytes:
            return Fetcher((f"{address}/v1",), most, public=lambda ip: True).for_request()(address + path)

        assert json.loads(fetch("/v1/models", 1000))["object"] == "list"
        with pytest.raises(Refused, match="more than 10 bytes"):
            fetch("/v1/models", 10)
        with pytest.raises(Refused, match="the server answered 307, and redirects are not followed"):
            fetch("/v1/models/", 1000)

    @pytest.mark.parametrize(
        "prefix", ["images.org", "ftp://images.org/", "https://", "https://a@images.org/", "http://images.org:99999/"]
    )
    def test_a_prefix_is_a_url(self, prefix: str) -> None:
        with pytest.raises(UserError, match="--allow-url"):
            check_prefix(prefix)

    def test_a_path_that_is_no_ascii_is_quoted_and_a_bad_name_refused(self, address: str) -> None:
        fetch = Fetcher((address, "http://a..b/"), 1000, public=lambda ip: True).for_request()
        with pytest.raises(Refused, match="the server answered 404"):
            fetch(f"{address}/bü r.png?größe=1")
        with pytest.raises(Refused, match="has no address"):
            fetch("http://a..b/x.png")

    def test_urls_of_a_request_are_limited_together(self, address: str) -> None:
        size = len(Fetcher((address,), 1000, public=lambda ip: True).for_request()(f"{address}/v1/models"))
        fetch = Fetcher((address,), 2 * size, public=lambda ip: True).for_request()
        assert len(fetch(f"{address}/v1/models") + fetch(f"{address}/v1/models")) == 2 * size
        with pytest.raises(Refused, match=f"the URLs of this request have more than {2 * size} bytes"):
            fetch(f"{address}/v1/models")

    @pytest.mark.parametrize(
        "head", [b"", b"Connection: close\r\nContent-Length: 1000\r\n\r\n", b"Content-Length: 9\r\n\r\n"]
    )
    def test_a_server_that_sends_slowly_is_cut_off(self, head: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def drip() -> None:
                client, _ = listener.accept()
                with client, suppress(OSError):
                    client.sendall(b"HTTP/1.1 200 OK\r\n" + head)
                    for _ in range(100):
                        client.sendall(b"x")
                        time.sleep(0.1)

            threading.Thread(target=drip, daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
            begun = time.monotonic()
            with pytest.raises(Refused, match="take more than 0.5 seconds"):
                Fetcher((url,), 1000, public=lambda ip: True, seconds=0.5).for_request()(url)
            assert time.monotonic() - begun < 3

    def test_a_picture_that_ends_early_is_refused(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def tear() -> None:
                client, _ = listener.accept()
                with client:
                    client.recv(4096)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(10))

            threading.Thread(target=tear, daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
            with pytest.raises(Refused, match="ended after 10 bytes"):
                Fetcher((url,), 1000, public=lambda ip: True).for_request()(url)


def test_urls_are_counted_before_any_is_fetched() -> None:
    fetched: list[str] = []

    def load(url: str) -> bytes:
        fetched.append(url)
        return b""

    part = {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}
    with pytest.raises(Refused, match="5000 images in one request, the limit is 3"):
        read_request(ask("?", *[part] * 5000), load, load, LIMITS)
    assert not fetched


def test_a_client_that_leaves_before_the_answer_frees_the_model() -> None:
    worker = Worker(Echo(pause=0.05), Limits())
    with served(build_app(worker, Fetcher((), 1000))) as address:
        with socket.create_connection(("127.0.0.1", urlsplit(address).port)) as client:
            body = json.dumps(ask("x" * 2000)).encode()  # 20 seconds
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            time.sleep(0.5)
        begun = time.monotonic()
        status, _ = send(address, "POST", "/v1/chat/completions", ask("next"))
        assert status == 200 and time.monotonic() - begun < 10
    worker.close()


def test_questions_nobody_waits_for_make_room_in_the_queue() -> None:
    worker = Worker(Echo(pause=0.1), Limits(waiting=1))
    jobs = [worker.submit(question("a long question"), Options(), lambda event: None)]
    time.sleep(0.05)  # it is being answered
    jobs.append(worker.submit(question("one that waits"), Options(), lambda event: None))
    with pytest.raises(Refused, match="1 questions wait already"):
        worker.submit(question("?"), Options(), lambda event: None)
    jobs[1].stop.set()
    worker.submit(question("?"), Options(), lambda event: None)
    worker.close()


def test_bodies_are_limited_together() -> None:
    worker = Worker(Echo(), Limits(body_bytes=100_000, bodies_bytes=150_000))
    with served(build_app(worker, Fetcher((), 1000))) as address:
        half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", urlsplit(address).port)) as client:
            client.sendall(half + b"Content-Length: 100000\r\n\r\n" + bytes(90_000))
            time.sleep(0.5)
            status, answer = send(address, "POST", "/v1/chat/completions", {"pad": "x" * 80_000})
            assert status == 429 and "the limit is 150000" in answer["error"]["message"]
        time.sleep(0.5)
        assert send(address, "POST", "/v1/chat/completions", {"pad": "x" * 80_000})[0] == 400
    worker.close()


def test_a_page_of_another_site_uploads_nothing(address: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    for origin in ("https://evil.org", "null", "http://localhost:1"):
        status, answer = send(address, "POST", "/v1/files", form, {**kind, "origin": origin})
        assert status == 403 and answer["error"]["code"] == "foreign_site"
    status, file = send(address, "POST", "/v1/files", form, {**kind, "origin": address})
    assert status == 200
    send(address, "DELETE", f"/v1/files/{file['id']}")


def test_which_names_are_this_machine_alone() -> None:
    assert all(map(is_local, ("127.0.0.1", "127.0.0.2", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.org", "")))


@pytest.mark.parametrize(
    ("host", "status"), [("127.0.0.2:8000", 200), ("[::1]:8000", 200), ("evil.org", 400), ("[", 400)]
)
def test_the_host_header_names_this_machine(address: str, host: str, status: int) -> None:
    assert send(address, "GET", "/v1/models", headers={"host": host})[0] == status


@pytest.mark.parametrize("verb", ["serve", "page"])
def test_a_taken_port_is_said_before_the_model_is_loaded(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not even exist."""
    if verb == "page":
        monkeypatch.setitem(sys.modules, "megatron_eagle.serving.page", SimpleNamespace(build_page=None))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main([verb, "nowhere", "--port", str(taken.getsockname()[1])])
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_the_command_limits_connections(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    monkeypatch.setattr("megatron_eagle.cli.serve.open_answerer", lambda *_, **__: (Echo(), None))
    with pytest.raises(SystemExit):
        main(["serve", "nowhere", "--port", "0"])
    assert [config.limit_concurrency for config in configs] == [320]
    assert capsys.readouterr().out.startswith("echo: http://127.0.0.1:")
