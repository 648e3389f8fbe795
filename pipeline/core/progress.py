"""`progress.json` of a run directory: where the process that works on it stands, for whoever looks from outside."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pipeline.core.run import Json, read_json, write_json
from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
ActorKind = Literal["rollout", "retriever", "weighting", "learner"]
"""Of the actors of a run; ranks of a learner are replaced together."""
PERIOD_S = 1.0
"""Least time between two writes within a phase, in seconds."""


def restarts_of(progress: Json | None) -> dict[str, int]:
    """How many actors of each kind took the place of a lost one, in all processes that worked on the run."""
    return dict.fromkeys(get_args(ActorKind), 0) | ((progress or {}).get("restarts") or {})


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


Move = Callable[[float, float | None, float | None], None]
"""Says how far a phase has come, of how much; and, if that was not known yet, where this process began."""


class ProgressFile:
    """Writes it. Of phases that go on at once the one that began last is told. Several threads may move them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: Json = {
            "state": "running",
            "reason": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": now(),
        }
        self._restarts = restarts_of(read_json(path))
        self._phases: list[Json] = []
        self._last_phase: Json | None = None
        self._due, self._works = 0.0, True
        self._lock = threading.Lock()
        self._write()

    @contextmanager
    def phase(self, name: str, total: float | None, unit: str | None, begun_at: float = 0) -> Iterator[Move]:
        """A phase while the block runs, and what moves it. So much of it was done before."""
        phase: Json = {"name": name, "unit": unit, "begun_at": begun_at, "done": begun_at, "total": total}
        phase["since"] = now()

        def move(done: float, total: float | None, begun_at: float | None) -> None:
            with self._lock:
                phase.update(done=done, total=total)
                if begun_at is not None:
                    phase["begun_at"] = begun_at
                if time.monotonic() >= self._due:
                    self._write()

        with self._lock:
            self._phases.append(phase)
            self._write()
        try:
            yield move
        finally:
            with self._lock:
                self._last_phase = phase
                self._phases = [other for other in self._phases if other is not phase]
                if self._phases:
                    self._write()

    def restarted(self, kind: ActorKind) -> None:
        """An actor took the place of a lost one."""
        with self._lock:
            self._restarts[kind] += 1
            self._write()

    def end(self, state: str, reason: str | None) -> None:
        """The last word: finished, failed or interrupted. The phase stays that was the last one."""
        with self._lock:
            self._process.update(state=state, reason=reason)
            self._write()

    def _write(self) -> None:
        phase = self._phases[-1] if self._phases else self._last_phase
        self._due = time.monotonic() + PERIOD_S
        try:
            write_json(
                self._path, {**self._process, "updated": now(), "phase": phase, "restarts": self._restarts}
            )
        except (OSError, RetrieverError) as error:
            # A run does not end because nobody can be told of it: what matters on a full disk fails by itself.
            if self._works:
                logger.warning(f"progress cannot be written ({error})")
            self._works = False
