"""Pictures by URL, which are refused unless a prefix was allowed; never from this machine or its network.

The name is resolved once, every address it has must be public, and the connection goes to the address that was checked,
so that a name cannot change what it means in between. Redirects are not followed. All URLs of a request have bytes and
time in common, which a server that sends slowly cannot stretch.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from megatron_eagle.errors import UserError
from megatron_eagle.serving.limits import Refused

TIMEOUT = 10.0  # seconds that a connection or a read may take
DEADLINE = 60.0  # seconds that all URLs of a request may take
AS_IT_IS = "/%:@!$&'()*+,;=~?"  # of a path or a query; the rest, such as umlauts and spaces, is quoted
PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an IP address is of the internet: not loopback, private, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    return ip.is_global and not ip.is_multicast


def check_prefix(prefix: str) -> str:
    """``prefix`` if it is one that URLs can be allowed by; UserError otherwise."""
    try:
        parts = urlsplit(prefix)
        _ = parts.port  # read, it is checked
    except ValueError as error:
        raise UserError(f"--allow-url {prefix}: {error}") from None
    if parts.scheme not in PORTS or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise UserError(f"--allow-url {prefix}: should be http:// or https://, a host, and perhaps the start of a path")
    return prefix


@dataclass(frozen=True)
class Fetcher:
    """Gets what begins with one of ``prefixes``, for one request at most ``most_bytes`` in at most ``seconds``.

    public: which addresses may be asked.
    """

    prefixes: Sequence[str]
    most_bytes: int
    public: Callable[[str], bool] = is_public
    seconds: float = DEADLINE

    def for_request(self) -> Callable[[str], bytes]:
        """What fetches the URLs of one request, in one thread; Refused with the reason."""
        until, taken = time.monotonic() + self.seconds, 0

        def fetch(url: str) -> bytes:
            nonlocal taken
            data = self._fetch(url, self.most_bytes - taken, until)
            taken += len(data)
            return data

        return fetch

    def _fetch(self, url: str, most: int, until: float) -> bytes:
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _refused(url, "it cannot be read as one") from None
        if not any(_allows(urlsplit(prefix), parts, port) for prefix in self.prefixes):
            raise _refused(url, "no --allow-url covers it; send the picture itself, as a data: URL or a file")
        target = quote(f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}", AS_IT_IS)
        with self._connect(url, parts, port, until) as connection:
            try:
                connection.request("GET", target)
                answer = connection.getresponse()
                status, data = answer.status, answer.read(most + 1)
                torn = bool(answer.length) and len(data) <= most
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() < until:
                    raise _refused(url, f"it cannot be fetched: {error or type(error).__name__}") from None
                status, data, torn = 0, b"", True
        if time.monotonic() >= until:
            raise _refused(url, f"the URLs of this request take more than {self.seconds:g} seconds")
        if status != 200:
            raise _refused(url, f"the server answered {status}, and redirects are not followed")
        if len(data) > most:
            raise _refused(url, f"the URLs of this request have more than {self.most_bytes} bytes")
        if torn:
            raise _refused(url, f"the server ended after {len(data)} bytes of more")
        return data

    def _connect(self, url: str, parts: SplitResult, port: int, until: float) -> "_Pinned":
        host = parts.hostname or ""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _refused(url, f"{host} has no address: {error}") from None
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not self.public(address):
                raise _refused(url, f"{host} is {address}, which is not an address of the internet")
        return _Pinned(host, port, addresses[0], until, secure=parts.scheme == "https")


class _Pinned(http.client.HTTPConnection):
    """A connection for ``host`` that goes to ``address`` and is cut at ``until``, whatever it is doing then."""

    def __init__(self, host: str, port: int, address: str, until: float, *, secure: bool) -> None:
        super().__init__(host, port, timeout=TIMEOUT)
        self._address, self._until, self._secure = address, until, secure
        self._cut = threading.Timer(0, lambda: None)

    def connect(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        self.sock = socket.create_connection((self._address, self.port), min(TIMEOUT, left))
        self.sock.settimeout(TIMEOUT)
        if self._secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._cut = threading.Timer(max(0.0, self._until - time.monotonic()), _shut, (self.sock,))
        self._cut.daemon = True
        self._cut.start()
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def __enter__(self) -> "_Pinned":
        return self

    def __exit__(self, *_: object) -> None:
        """Not in ``close``, which http.client calls before the content is read if nothing is to follow it."""
        self._cut.cancel()
        self.close()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not SSLSocket's, which another thread may be reading


def _allows(prefix: SplitResult, url: SplitResult, port: int) -> bool:
    path = unquote(url.path)
    return (
        url.scheme == prefix.scheme
        and url.hostname == prefix.hostname
        and port == (prefix.port or PORTS[prefix.scheme])
        and not url.username
        and url.path.startswith(prefix.path)
        and not {".", ".."} & set(path.replace("\\", "/").split("/"))
        and path.isprintable()
    )


def _refused(url: str, why: str) -> Refused:
    return Refused(f"the URL {url[:200]!r} is refused: {why}", "url_refused")
