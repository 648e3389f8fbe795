"""How to serve: every setting of the HTTP service with its default."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, field

from retriever_service.errors import RetrieverError
from retriever_service.service.limits import Limits

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "EXSEARCH_TOKEN"
"""Environment variable with the bearer token of a server, for those who serve and those who ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The settings of a server."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is not reachable from other machines."""
    port: int = 8000
    """0 takes a free one."""
    token: str | None = field(default=None, repr=False)
    """If set, clients must send it as a bearer token, except to /healthz and /readyz."""
    read_only: bool = False
    """Passages cannot be added or deleted over HTTP."""
    max_batch: int = 128
    """Most queries in one batch."""
    max_waiting: int = 8_192
    """Queries that may wait; beyond it, requests get 429."""
    cached_answers: int = 20_000
    """Answers to recent queries that are kept; 0 keeps none."""
    deadline_s: float = 30.0
    """A search that took longer gets 504. Clients may ask for less, but not for less than a second."""
    update_deadline_s: float = 600.0
    """An addition or deletion that took longer gets 504; it may still be made."""
    body_deadline_s: float = 10.0
    """A request body that takes longer to arrive gets 408."""
    refresh_s: float = 10.0
    """How often to look whether another process has changed the index, in seconds; 0 for never."""
    grace_s: float = 20.0
    """After SIGTERM, what is being answered may take so long."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise RetrieverError(f"port {self.port}: there are 0 (a free one) to 65535")
        for name in ("max_batch", "max_waiting", "deadline_s", "update_deadline_s", "body_deadline_s"):
            if getattr(self, name) <= 0:
                raise RetrieverError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("cached_answers", "refresh_s", "grace_s"):
            if getattr(self, name) < 0:
                raise RetrieverError(f"{name} must not be below 0, got {getattr(self, name)}")
        if self.token is not None and not (
            self.token.isascii() and self.token.isprintable() and self.token.strip()
        ):
            raise RetrieverError("the token must be of printable ASCII characters, and not empty")
        warn_if_open(self.host, self.token, "search")


def warn_if_open(host: str, token: str | None, verb: str) -> None:
    """Say who may do that on a server which other machines reach, and which asks nobody for a token."""
    if token is None and not _is_loopback(host):
        logger.warning(f"everyone who can reach {host} can {verb} here: no token is set")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
