"""Pictures by URL, which are refused unless a prefix was allowed; never from this machine or its network.

The name is resolved once, every address it has must be public, and the connection goes to the address that was checked,
so that a name cannot change what it means in between. Redirects are not followed.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from megatron_eagle.errors import UserError
from megatron_eagle.serving.limits import Refused

TIMEOUT = 10.0  # seconds that a connection or a read may take
PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an IP address is of the internet: not loopback, private, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    return ip.is_global and not ip.is_multicast


def check_prefix(prefix: str) -> str:
    """``prefix`` if it is one that URLs can be allowed by; UserError otherwise."""
    parts = urlsplit(prefix)
    if parts.scheme not in PORTS or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise UserError(f"--allow-url {prefix}: should be http:// or https://, a host, and perhaps the start of a path")
    return prefix


@dataclass(frozen=True)
class Fetcher:
    """Gets what begins with one of ``prefixes``, at most ``most_bytes`` of it. public: which addresses may be asked."""

    prefixes: Sequence[str]
    most_bytes: int
    public: Callable[[str], bool] = is_public

    def fetch(self, url: str) -> bytes:
        """The content; Refused with the reason."""
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _refused(url, "it cannot be read as one") from None
        if not any(_allows(urlsplit(prefix), parts, port) for prefix in self.prefixes):
            raise _refused(url, "no --allow-url covers it; send the picture itself, as a data: URL or a file")
        with contextlib.closing(self._connect(url, parts, port)) as connection:
            try:
                connection.request("GET", f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}")
                answer = connection.getresponse()
                if answer.status != 200:
                    raise _refused(url, f"the server answered {answer.status}, and redirects are not followed")
                data = answer.read(self.most_bytes + 1)
            except (OSError, http.client.HTTPException) as error:
                raise _refused(url, f"it cannot be fetched: {error or type(error).__name__}") from None
        if len(data) > self.most_bytes:
            raise _refused(url, f"it has more than {self.most_bytes} bytes")
        return data

    def _connect(self, url: str, parts: SplitResult, port: int) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise _refused(url, f"{host} has no address: {error}") from None
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not self.public(address):
                raise _refused(url, f"{host} is {address}, which is not an address of the internet")
        return _Pinned(host, port, addresses[0], secure=parts.scheme == "https")


class _Pinned(http.client.HTTPConnection):
    """A connection for ``host`` that goes to ``address``."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool) -> None:
        super().__init__(host, port, timeout=TIMEOUT)
        self._address, self._secure = address, secure

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), TIMEOUT)
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(plain, server_hostname=self.host) if self._secure else plain


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
