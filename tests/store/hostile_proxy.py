"""A proxy before an S3-compatible server that answers as stores do on a bad day, and writes down every byte it sent."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW = 3.0  # seconds, longer than the client waits
FAULTS = ("500", "503", "cut", "short", "slow", "refuse")


@dataclass(frozen=True)
class Answered:
    """One request: method and path, the bytes asked for ("" for all), what was done to it, bytes of the body sent."""

    method: str
    path: str
    range: str
    fault: str
    status: int
    sent: int


@dataclass
class Proxy:
    """url: to ask; fault_of: what to do to the n-th request, from 0, for this (method, path, range), "" for nothing."""

    url: str
    fault_of: Callable[[str, str, str, int], str] = lambda method, path, asked, nth: ""
    log: list[Answered] = field(default_factory=list)
    asked: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def whole(self, ending: str) -> list[Answered]:
        """Answers to GET that came as they should, for paths with this ending."""
        return [one for one in self.log if one.method == "GET" and not one.fault and one.path.endswith(ending)]


@contextmanager
def hostile_proxy(port: int) -> Iterator[Proxy]:
    """Before the server at ``port`` of this machine."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.forward()

        do_GET = do_PUT = do_POST = do_HEAD

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            what = self.command, self.path.partition("?")[0], self.headers.get("Range", "")
            with lock:
                fault = proxy.fault_of(*what, proxy.asked[what])
                proxy.asked[what] += 1
            if fault == "refuse":
                self.note(what, fault, 0, 0)
                self.close_connection = True
                return
            if fault == "slow":
                self.note(what, fault, 0, 0)
                time.sleep(SLOW)
                self.close_connection = True
                return
            if fault in ("500", "503", "gone"):
                status = 404 if fault == "gone" else int(fault)
                self.note(what, fault, status, 0)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            server = http.client.HTTPConnection("127.0.0.1", port)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            sent = data[: len(data) // 2] if fault in ("cut", "short") and len(data) > 1 else data
            for name, value in answer.getheaders():
                if name.lower() == "content-length" and fault == "short":
                    value = str(len(sent))
                if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)
            self.note(what, fault if len(sent) < len(data) else "", answer.status, len(sent))
            self.close_connection = fault == "cut"

        def note(self, what: tuple[str, str, str], fault: str, status: int, sent: int) -> None:
            with lock:
                proxy.log.append(Answered(*what, fault, status, sent))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
