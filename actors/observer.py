"""The driver's end of what is logged and counted: names for the actors, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from actors import metrics
from actors.actor_log import Identity
from pipeline.core.progress import ActorKind

logger = logging.getLogger(__name__)

LOGS = "logs"
"""Of the actors, in the run directory."""


class Observer:
    """Of one run; without a run directory actors neither log nor count.

    Args:
        run: its directory, on a file system that all nodes share.
        on_restart: told the kind of an actor that took the place of a lost one.
    """

    def __init__(
        self, run: Path | None = None, on_restart: Callable[[ActorKind], None] = lambda kind: None
    ) -> None:
        self._run, self._on_restart = run, on_restart
        self._unseen: dict[Identity, tuple[int, int]] = {}
        """Actors that were begun, and their files as they were before."""
        self._has_warned = False
        if run is not None:
            metrics.belongs_to(run=run.name)

    def identity(self, kind: ActorKind, policy: str = "", number: int = 0) -> Identity | None:
        """For an actor that is about to be started."""
        if self._run is None:
            return None
        identity = Identity(self._run.name, str(self._run / LOGS), kind, policy, number)
        self._unseen[identity] = _stamp(identity.path)
        return identity

    def check_logs(self) -> None:
        """Once those that were begun are up: warn, once, of logs that do not arrive."""
        silent = [
            identity.name for identity, before in self._unseen.items() if _stamp(identity.path) == before
        ]
        self._unseen.clear()
        if silent and self._run is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{self._run / LOGS}: no log arrives of {', '.join(silent)}; their nodes cannot write there, or have "
                "another file system under that path. What they print is in Ray's logs on those nodes"
            )

    def lost(self, kind: ActorKind, policy: str = "") -> None:
        """An actor died, hangs or missed something, and was ended."""
        metrics.LOST.add(kind=kind, policy=policy)

    def restarted(self, kind: ActorKind, policy: str = "") -> None:
        """Another one is at work in its place."""
        metrics.RESTARTS.add(kind=kind, policy=policy)
        self._on_restart(kind)

    def close(self) -> None:
        """The driver counts nothing from here on."""
        metrics.belongs_to()


def _stamp(path: Path) -> tuple[int, int]:
    """Changes with every line."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
