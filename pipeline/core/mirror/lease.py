"""That one process at a time writes under a URL, without locks: who does says so, again and again.

A process that was killed leaves its lease. It is taken over at once by a process that has the lock of the same run
directory, and by any other one after `LEASE_S` without a sign of life. No clock of another machine is asked.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.mirror.store import Store, StoreError
from retriever_service.files import json_object

LEASE = "lease.json"
LEASE_S = 60.0
"""A holder that gives no sign of life for so long is dead, in seconds."""
BEAT_S = 15.0
"""Time between two signs of life, in seconds."""
POLL_S = 2.0


class LeaseLost(Exception):
    """Another process writes there now."""


class Lease:
    """Of one process.

    Args:
        run: the run directory, whose lock the process holds.
        waiting: shows a person what is being waited for.
    """

    def __init__(self, store: Store, run: Path, waiting: Callable[[str], None]) -> None:
        self._store, self._waiting = store, waiting
        self._mine = {
            "holder": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "run": str(run),
        }
        self._beats = 0

    def acquire(self) -> None:
        """
        Raises:
            UserError: another process writes there.
            StoreError: the store is out of reach.
        """
        found = self._store.read(LEASE)
        if found is not None and not self._is_of_this_directory(found):
            self._wait_for_its_end(found)
            found = self._store.read(LEASE)
        if found is None:
            if not self._store.create(LEASE, self._content()):
                raise self._taken(self._store.read(LEASE) or b"")
        else:
            self._store.write(LEASE, self._content())
        self.check()

    def check(self) -> None:
        """
        Raises:
            LeaseLost: another process has it.
            StoreError: the store is out of reach.
        """
        found = self._store.read(LEASE)
        if found is None or _read(found).get("holder") != self._mine["holder"]:
            raise LeaseLost(
                f"{self._store.url} was taken over by another process: this one gave no sign of life for long"
            )

    def beat(self) -> None:
        """Give a sign of life; raises as `check` does."""
        self.check()
        self._store.write(LEASE, self._content())

    def release(self) -> None:
        """Leave it to the next one; raises as `check` does."""
        self.check()
        self._store.delete(LEASE)

    def _content(self) -> bytes:
        self._beats += 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps({**self._mine, "beat": self._beats, "time": now}).encode()

    def _is_of_this_directory(self, found: bytes) -> bool:
        other = _read(found)
        return all(other.get(key) == self._mine[key] for key in ("host", "run"))

    def _wait_for_its_end(self, found: bytes) -> None:
        deadline = time.monotonic() + LEASE_S
        self._waiting(f"{self._whose(found)}; waiting {LEASE_S:.0f} s for a sign of life")
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            now = self._store.read(LEASE)
            if now is None:
                return
            if now != found:
                raise self._taken(now)

    def _taken(self, found: bytes) -> UserError:
        return UserError(f"{self._whose(found)}; wait for it, or choose another storage.url")

    def _whose(self, found: bytes) -> str:
        other = _read(found)
        return (
            f"{self._store.url} belongs to another process ({other.get('pid')} on {other.get('host')}, run "
            f"{other.get('run')}, last sign of life {other.get('time')})"
        )


def is_fresh(store: Store) -> bool | None:
    """Whether a process seems to write there, by this machine's clock; None if that cannot be said."""
    try:
        told = _read(store.read(LEASE) or b"").get("time")
    except StoreError:
        return None
    if told is None:
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(str(told))
    return age.total_seconds() < 2 * LEASE_S


def _read(content: bytes) -> dict[str, object]:
    try:
        return json_object(content)
    except ValueError:
        return {}
