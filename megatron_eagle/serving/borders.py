"""Which requests a server refuses unread: those that a web page of another site makes a browser send.

A browser says in ``Origin`` whose page sends what is no mere reading, and in ``Host`` by which name it came here: a
name of elsewhere that was made to mean this machine is not this machine's.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

READING = ("GET", "HEAD", "OPTIONS")


def is_local(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine and reached from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class OwnSite:
    """Refuses requests of other sites' pages. local: and whatever came by a name that is not this machine's own."""

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (why := self._refusal(scope)):
            status, message = why
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "foreign_site"}
            await JSONResponse({"error": error}, status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._local and not is_local(_name(host)):
            return 400, f"{host[:100]!r} is not a name of this machine (Invalid host header)"
        origin = headers.get("origin")
        if origin is None or scope.get("method") in READING:
            return None
        if origin.partition("://")[2].lower() != host.lower():
            return 403, f"a page of {origin[:100]!r} may not ask {host[:100]!r}"
        return None


def _name(host: str) -> str:
    """The name in a Host header."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
