"""The socket of a server, before there is a server."""

from __future__ import annotations

import socket

from retriever_service.errors import RetrieverError


def listen(host: str, port: int, *, backlog: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        RetrieverError: the address cannot be listened on.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        raise RetrieverError(
            f"cannot listen on {host} port {port} ({error}); name another address or port"
        ) from error


def url_of(listener: socket.socket) -> str:
    """By which it is reached from its own machine."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
