"""An OpenAI-compatible endpoint on loopback that does what a test tells it: answers, waits, errs, cuts connections."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "right-key"


@dataclass(frozen=True)
class Act:
    """What the server does once. status 0: it cuts the connection, after ``cut`` bytes of its answer."""

    text: str | None = "fine"
    status: int = 200
    wait: float = 0.0
    cut: int = 0
    finish: str = "stop"
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = (10, 5)


def asked_text(body: dict[str, Any]) -> str:
    """All words of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@dataclass
class Server:
    """act: of a request's body and how often the same was asked before. answered, asked: how often each body was."""

    act: Callable[[dict[str, Any], int], Act]
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def endpoint_server(act: Callable[[dict[str, Any], int], Act]) -> Iterator[Server]:
    state = Server(act)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()

        def refused(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {KEY}":
                return False
            self.send(401, b'{"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}', {})
            return True

        def do_GET(self) -> None:
            if not self.refused():
                self.send(200, b'{"object": "list", "data": []}', {})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.refused():
                return
            body = json.loads(raw)
            text = json.dumps(body, sort_keys=True)
            with state.guard:
                before = state.asked[text]
                state.asked[text] += 1
                state.times.append(time.monotonic())
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                self.do(state.act(body, before), text)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with state.guard:
                    state.at_once -= 1

        def do(self, act: Act, asked: str) -> None:
            time.sleep(act.wait)
            usage = {"prompt_tokens": act.usage[0], "completion_tokens": act.usage[1]} if act.usage else None
            message = {"role": "assistant", "content": act.text}
            answer = {
                "id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
                "choices": [{"index": 0, "message": message, "finish_reason": act.finish}],
            }  # fmt: skip
            body = act.body if act.body is not None else json.dumps(answer).encode()
            if act.status == 0:
                self.send(200, body, act.headers, act.cut)
            elif act.status != 200:
                self.send(act.status, act.body or b'{"error": {"message": "told so"}}', act.headers)
            else:
                with state.guard:
                    state.answered[asked] += 1
                self.send(200, body, act.headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
