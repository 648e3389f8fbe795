"""How to serve: every setting with its default."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from pipeline.core.errors import UserError
from retriever_service.service.hosts import check_names
from retriever_service.service.settings import warn_if_open

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:-]+")
"""As browsers send it: in small letters, and with nothing behind the port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    max_body_bytes: int = 2**20
    """Longest request body, in bytes: 413 beyond it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """The settings of a server.

    Raises:
        UserError, RetrieverError: one makes no sense.
    """

    host: str = "127.0.0.1"
    """Address to listen on. The default is not reachable from other machines."""
    port: int = 8080
    """0 takes a free one."""
    token: str | None = field(default=None, repr=False)
    """If set, clients must send it as a bearer token, except to /healthz, /readyz and for the page."""
    allow_origins: tuple[str, ...] = ()
    """Origins, as `https://chat.example.org`, whose pages may ask from a browser (CORS)."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that it answers to beside its own, as behind a proxy."""
    name: str = "exsearch"
    """What the model is called in `/v1/models` and in requests."""
    lenient: bool = False
    """What cannot be heeded, system messages and a greeting of the assistant's are passed over where they would be
    refused; replies name them."""
    max_conversations: int | None = None
    """Answers that are made at once. None: as many as the engine's KV cache holds."""
    max_waiting: int = 256
    """Answers that may wait for one of these to end; beyond it requests get 429."""
    deadline_s: float = 120.0
    """An answer that took longer gets 504, in seconds. It does not run while a newer model is being loaded."""
    body_deadline_s: float = 10.0
    """A request body that takes longer to arrive gets 408, in seconds."""
    grace_s: float = 30.0
    """After SIGTERM, answers that have begun may take so long, in seconds."""
    follow_s: float = 10.0
    """How often to look for a newer iteration of the run that is followed, in seconds."""
    max_restarts: int = 2
    """An engine that was lost is started again; after so many starts in a row that failed the server ends."""
    limits: BodyLimits = BodyLimits()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise UserError(f"port {self.port}: there are 0 (a free one) to 65535")
        for name in ("deadline_s", "body_deadline_s", "follow_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("max_waiting", "grace_s", "max_restarts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number, and not below 0, got {getattr(self, name)}")
        if self.max_conversations is not None and self.max_conversations < 1:
            raise UserError(f"max_conversations must be at least 1, got {self.max_conversations}")
        for field_ in fields(self):
            if field_.name in ("token", "name") and (text := getattr(self, field_.name)) is not None:
                _check_word(field_.name, text)
        check_names(self.allowed_hosts)
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(
                    f"{origin!r} is no origin: give scheme and host, and the port where there is one, as in "
                    "https://chat.example.org"
                )
        warn_if_open(self.host, self.token, "ask")


def _check_word(name: str, text: str) -> None:
    if not (text and text.isascii() and text.isprintable() and " " not in text):
        raise UserError(f"the {name} must be of printable ASCII characters without spaces, and not empty")


def read_token(file: Path) -> str:
    """The bearer token that a file holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read: {error}") from error
