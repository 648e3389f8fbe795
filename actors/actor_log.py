"""The log of an actor: JSON lines in the run directory, beside what its process prints into Ray's own logs.

One line (`exception` only where there is one; `number` counts the actors of a kind and policy):

    {"time": "2026-03-01T12:00:00.123+00:00", "level": "INFO", "logger": "actors.rollout",
     "message": "serves version 3", "actor": "rollout-searcher-0", "kind": "rollout", "policy": "searcher",
     "number": 0, "node": "gpu-7", "pid": 4711}

An actor that takes the place of a lost one appends to the same file. So do the processes of a worker's engine, which
know whose they are by the environment.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from actors import metrics
from pipeline.core.progress import ActorKind

logger = logging.getLogger(__name__)

FILE_BYTES = 16 << 20
"""Size at which a file becomes `NAME.jsonl.1`, in place of the one before."""
_OURS = ("actors", "pipeline", "retriever_service")
_APART = ("vllm", "DeepSpeed")
"""Libraries that keep their loggers from the root's handlers."""
_IDENTITY = "EXSEARCH_ACTOR"

_handler: logging.Handler | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Which actor of which run a process is.

    Attributes:
        run: name of the run.
        logs: directory of the actors' logs.
        number: among the actors of its kind and policy.
    """

    run: str
    logs: str
    kind: ActorKind
    policy: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self.policy, str(self.number)) if part)

    @property
    def path(self) -> Path:
        return Path(self.logs) / f"{self.name}.jsonl"


def introduce(identity: Identity | None) -> None:
    """Called by an actor first of all: from now on its process logs and counts under this name.

    None: it belongs to no run, and nothing is logged or counted. Where the file cannot be written the actor works all
    the same; the driver says so (`Observer.is_up`).
    """
    if identity is None:
        return
    os.environ[_IDENTITY] = json.dumps(asdict(identity))
    metrics.belongs_to(run=identity.run, policy=identity.policy, actor=identity.name)
    _log_as(identity)
    logger.info("begins")


def introduce_libraries() -> None:
    """Called where a library that has its own handlers was loaded, also in a process that such a library started."""
    if _IDENTITY in os.environ:
        _log_as(Identity(**json.loads(os.environ[_IDENTITY])))


def _log_as(identity: Identity) -> None:
    """May be called again: no handler is added twice."""
    global _handler
    if _handler is None:
        try:
            identity.path.parent.mkdir(parents=True, exist_ok=True)
            _handler = _SharedFile(identity.path, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8")
        except OSError as error:
            logger.warning(f"the log {identity.path} cannot be written ({error})")
            return
        _handler.setFormatter(_JsonLine(identity))
        _handler.addFilter(_is_kept)
        _handler.handleError = _keep_quiet  # type: ignore[method-assign]
        root = logging.getLogger()
        root.addHandler(_handler)
        if logging.lastResort is not None:
            root.addHandler(logging.lastResort)  # warnings still go to Ray's logs as well
        for name in _OURS:
            logging.getLogger(name).setLevel(logging.INFO)
    for library in map(logging.getLogger, _APART):
        if not library.propagate and _handler not in library.handlers:
            library.addHandler(_handler)


def _is_kept(record: logging.LogRecord) -> bool:
    """Of other libraries warnings, also where one of them has set the root's level."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in (*_OURS, *_APART)


def _keep_quiet(record: logging.LogRecord) -> None:
    """A disk that is full meanwhile ends nothing here, and is heard of by what matters."""


class _JsonLine(logging.Formatter):
    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self._who = {
            "actor": identity.name,
            "kind": identity.kind,
            "policy": identity.policy,
            "number": identity.number,
            "node": socket.gethostname(),
        }

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {**self._who, "pid": record.process}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _SharedFile(RotatingFileHandler):
    """Several processes append to it; whoever finds that another one has rotated it goes on in the new file."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None and not _is_at(self.stream, self.baseFilename):
            self.stream.close()
            self.stream = None  # it is opened again
        super().emit(record)


def _is_at(stream: TextIO, path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))
    except OSError:
        return False
