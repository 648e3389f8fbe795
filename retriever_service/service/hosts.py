"""By which names a server may be asked for, and what it says with every answer: for servers that browsers ask.

A page of another site may make a name of its own point at this machine; what a browser asks for under such a name is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever_service.errors import RetrieverError

_EVERYWHERE = ("0.0.0.0", "::")
"""Addresses that listen on all of a machine: whoever chooses one has names for it that are not known here."""
_NAME = re.compile(r"[\w.-]+|\[[\da-f:.]+\]", re.ASCII | re.IGNORECASE)
_OWN_FILES_ONLY = "; ".join(
    [
        "default-src 'self'",
        "img-src data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
SAFE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _OWN_FILES_ONLY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""For answers that a browser may show: nothing but the server's own files is loaded or run."""


def own_names(host: str, url: str, given: Collection[str] = ()) -> frozenset[str] | None:
    """Names of a server, as they stand in URLs, that listens on `host` and is reached at `url`; None if all are its.

    Args:
        given: names that it has elsewhere, as by a proxy in front of it; see `check_names`.
    """
    if host in _EVERYWHERE and not given:
        return None
    own = ("localhost", "127.0.0.1", "[::1]", host, _name_in(urlsplit(url).netloc))
    return frozenset(name.lower() for name in (*own, *given))


def check_names(given: Collection[str]) -> None:
    """
    Raises:
        RetrieverError: one cannot be the name of a host.
    """
    for name in given:
        if not _NAME.fullmatch(name):
            raise RetrieverError(
                f"{name!r} is no name of a host: give it as in its addresses, without scheme, port and path"
            )


class HostCheck:
    """ASGI middleware: answers nobody who asks for another host, and adds `SAFE_HEADERS` to every answer.

    Starlette's own middleware for hosts cuts an IPv6 address at its first colon.

    Args:
        hosts: names that requests may be for, as in URLs; None allows all.
        headers: of every answer that has none of that name.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str] | None, headers: Mapping[str, str] = SAFE_HEADERS
    ) -> None:
        self._app, self._hosts = app, hosts
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", ()))
                named = {name for name, _ in own}
                message["headers"] = [*own, *(pair for pair in self._headers if pair[0] not in named)]
            await send(message)

        asked = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self._hosts is not None and _name_in(asked.lower()) not in self._hosts:
            refusal = PlainTextResponse("this server is not known by that name", status_code=400)
            await refusal(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)


def _name_in(host: str) -> str:
    """Without the port: "[::1]:80" is "[::1]"."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
