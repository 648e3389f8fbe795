"""The driver's end of what is logged and counted: names for the actors, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from actors import metrics
from actors.actor_log import Identity
from pipeline.core.progress import ActorKind
from pipeline.core.run import ACTOR_LOGS

logger = logging.getLogger(__name__)


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
        """Actors that are about to be started, and their files as they were before."""
        self._has_warned = False
        if run is not None:
            metrics.belongs_to(run=run.name)

    def identity(self, kind: ActorKind, policy: str = "", number: int = 0) -> Identity | None:
        """For an actor that is about to be started."""
        if (identity := self._identity(kind, policy, number)) is not None:
            self._unseen[identity] = _stamp(identity.path)
        return identity

    def is_up(self, kind: ActorKind, policy: str = "", number: int = 0) -> None:
        """An actor that `identity` was asked for answers: warn, once in a run, if its log does not arrive."""
        if (identity := self._identity(kind, policy, number)) is None:
            return
        before = self._unseen.pop(identity, None)
        if before == _stamp(identity.path) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{identity.logs}: no log arrives of {identity.name}; its node cannot write there, or has "
                "another file system under that path. What its process prints is in Ray's logs on that node"
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

    def _identity(self, kind: ActorKind, policy: str, number: int) -> Identity | None:
        if self._run is None:
            return None
        return Identity(self._run.name, str(self._run / ACTOR_LOGS), kind, policy, number)


def _stamp(path: Path) -> tuple[int, int]:
    """Changes with every line."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
