"""Keeps the copy of a run directory up to date while the run goes on (`storage.url`).

A thread looks through the directory every few seconds, uploads what is complete and new, and then replaces the manifest
(`manifest.ManifestOf`). What fails is tried again, is counted and shown, and does not disturb the run; at its end the
copy must be whole.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.mirror.lease import BEAT_S, Lease, LeaseLost
from pipeline.core.mirror.manifest import Entry, ManifestOf, read_manifest, write_manifest
from pipeline.core.mirror.restore import AT_ONCE, CONFIGURATION, restore
from pipeline.core.mirror.scan import Found, State, complete_files, state_of
from pipeline.core.mirror.store import Store, StoreError
from pipeline.core.run import MIRROR_FILE, read_json, write_json
from retriever_service import files
from retriever_service.backoff import Backoff
from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

PERIOD_S = 10.0
"""Time between two looks at the directory, in seconds."""
RUNNING_S = 60.0
"""Logs and progress alone are copied this often, in seconds."""
MOST_PAUSE_S = 60.0
"""Longest pause behind a failure, in seconds."""
END_S, CUT_OFF_S = 600.0, 30.0
"""What is left is tried for so long at the end of a run, and of one that was interrupted or failed, in seconds."""


@dataclass
class MirrorState:
    """`mirror.json` of the run directory: what its copy is and how it stands."""

    url: str
    id: str
    """Of this directory; the copy's manifest names whose it is."""
    restoring: bool = False
    files: int = 0
    bytes: int = 0
    """In the copy."""
    behind: int = 0
    """Files that are not in it yet."""
    failures: int = 0
    """Attempts that failed, of all starts."""
    last_error: str | None = None
    updated: str | None = None
    """When the copy was made new."""


class _Moved(Exception):
    """A file was replaced or went while it was uploaded: the directory has to be looked through again."""


class Mirror:
    """The copy of one run directory. Call `begin` under the directory's lock, then use as a context manager.

    Args:
        status: shows a person what is being waited for.
    """

    def __init__(
        self,
        run: Path,
        url: str,
        status: Callable[[str], AbstractContextManager[None]] = lambda text: nullcontext(),
    ) -> None:
        self.run, self._status = run.resolve(), status
        self.store = Store(url)
        self._lease = Lease(self.store, self.run, logger.warning)
        self._copied: dict[str, tuple[str, str]] = {}
        """By path the checksum and the object of what is uploaded and in no manifest yet."""
        self._known: dict[str, tuple[State, files.FileRecord]] = {}
        self._manifest, self._written_at = ManifestOf(""), 0.0
        self._stop, self._is_left, self._is_lost = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._heart = threading.Thread(target=self._give_signs_of_life, name="mirror-lease", daemon=True)

    def begin(self) -> None:
        """Take the URL for this process; fill the directory from the copy, if it holds no run.

        Raises:
            UserError: the store is out of reach or belongs to another process, or holds what is not of this directory.
        """
        try:
            with self._status(f"looking at {self.store.url}"):
                self._lease.acquire()
                manifest = read_manifest(self.store)
            self.state = self._enter(manifest)
        except StoreError as error:
            raise UserError(
                f"storage.url cannot be used: {error}. Look at the address, the bucket and the credentials"
            ) from error

    def _enter(self, manifest: ManifestOf | None) -> MirrorState:
        stored = read_json(self.run / MIRROR_FILE)
        before = MirrorState(**stored) if stored is not None else None
        new = MirrorState(self.store.url, uuid.uuid4().hex)
        if before is not None and before.url != self.store.url:
            before = None
        if manifest is None:
            return self._saved(before or new)
        is_new = not (self.run / CONFIGURATION).exists() or (before is not None and before.restoring)
        if is_new:
            new.restoring = True
            self._saved(new)
            with self._status(f"restoring the run from {self.store.url}"):
                restore(self.store, manifest, self.run)
            # From now on the copy is of this directory: another one that it was of is behind.
            self._manifest = ManifestOf(new.id, manifest.files)
            write_manifest(self.store, self._manifest)
            new.restoring = False
            return self._saved(new)
        if before is None or before.id != manifest.writer:
            raise UserError(
                f"{self.store.url} holds a run that went on in another directory than {self.run}. To go on with what "
                "is there, give an empty --run directory; else choose another storage.url"
            )
        self._manifest = manifest
        return self._saved(before)

    # ---------------------------------------------------------------- while the run goes on

    def __enter__(self) -> Mirror:
        self._heart.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Upload what is left.

        Raises:
            UserError: that cannot be done; not where the block ends by an exception.
        """
        self._stop.set()
        deadline = time.monotonic() + (END_S if kind is None else CUT_OFF_S)
        with self._status(f"uploading what is left to {self.store.url}"):
            self._thread.join(max(0.0, deadline - time.monotonic()))
            error = self._finish(deadline)
            self._is_left.set()
        if error is None:
            return
        message = (
            f"the copy at {self.store.url} is not whole, {self.state.behind} files are missing ({error}). The run "
            f"directory {self.run} is: the same command uploads what is left"
        )
        if kind is None:
            raise UserError(message)
        logger.warning(message)

    def _finish(self, deadline: float) -> str | None:
        """The last attempts; what keeps them from success."""
        if self._thread.is_alive():
            return "an upload does not end"
        backoff, failures = Backoff(1.0), 0
        while not self._attempt(at_end=True):
            failures += 1
            if self._is_lost or time.monotonic() >= deadline:
                return self.state.last_error
            time.sleep(min(backoff.pause_s(failures), MOST_PAUSE_S))
        self._is_left.set()
        self._heart.join(CUT_OFF_S)
        try:
            self._lease.release()
        except (StoreError, LeaseLost) as error:
            logger.warning(f"{self.store.url} could not be left: {error}")
        return None

    def _work(self) -> None:
        backoff, failures = Backoff(2.0), 0
        pause = 0.0
        while not self._stop.wait(pause):
            if self._attempt():
                failures, pause = 0, PERIOD_S
            else:
                failures += 1
                pause = min(backoff.pause_s(failures), MOST_PAUSE_S)
            if self._is_lost:
                return

    def _give_signs_of_life(self) -> None:
        while not self._is_left.wait(BEAT_S):
            try:
                self._lease.beat()
            except StoreError as error:
                logger.debug(f"no sign of life: {error}")
            except LeaseLost:
                return  # the next attempt notices as well

    def _attempt(self, at_end: bool = False) -> bool:
        """Bring the copy up to date; whether it is."""
        try:
            self._update(at_end)
        except (_Moved, FileNotFoundError):
            return not at_end  # something new is there, and is found at the next look
        except (StoreError, OSError, RetrieverError, LeaseLost) as error:
            self._is_lost = isinstance(error, LeaseLost)
            if self.state.last_error is None:
                logger.warning(f"the copy at {self.store.url} is behind ({error})")
            self.state.failures += 1
            self.state.last_error = str(error)
            self._saved(self.state)
            return False
        if self.state.last_error is not None:
            logger.info(f"the copy at {self.store.url} is up to date again")
            self.state.last_error = None
            self._saved(self.state)
        return True

    # ---------------------------------------------------------------- one look at the directory

    def _update(self, at_end: bool) -> None:
        found = complete_files(self.run, {name: state for name, (state, _) in self._known.items()})
        if CONFIGURATION not in found:
            raise OSError(f"{self.run} has no {CONFIGURATION} any more")
        records = {name: self._record(name, file) for name, file in found.items()}
        old = self._manifest.files
        new = [name for name in found if name not in old or old[name].record != records[name]]
        gone = old.keys() - found.keys()
        is_due = at_end or time.monotonic() - self._written_at >= RUNNING_S
        if not gone and all(found[name].is_running for name in new) and not (new and is_due):
            return
        self._lease.check()
        self.state.behind = len(new)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            keys = list(threads.map(lambda name: self._upload(name, found[name], records[name]), new))
        entries = {name: old[name] for name in found if name not in new}
        for name, key in zip(new, keys, strict=True):
            entries[name] = Entry(**asdict(records[name]), key=key, mtime=found[name].state[1] / 1e9)
        self._commit(ManifestOf(self.state.id, entries))

    def _record(self, name: str, file: Found) -> files.FileRecord:
        if name not in self._known or self._known[name][0] != file.state or file.content is not None:
            record = files.record_file(file.path) if file.content is None else _record_of(file.content)
            self._known[name] = file.state, record
        return self._known[name][1]

    def _upload(self, name: str, file: Found, record: files.FileRecord) -> str:
        """The object that has it now."""
        checksum, key = self._copied.get(name, ("", ""))
        if checksum == record.sha256:
            return key
        key = self._manifest.key_for(name, record.sha256)
        content = file.content
        if content is None and record.bytes <= _SMALL:
            content = file.path.read_bytes()
            if _record_of(content) != record:
                raise _Moved(name)
        if content is not None:
            self.store.write(key, content)
        else:
            self.store.upload(file.path, key)
            if state_of(file.path) != file.state:
                raise _Moved(name)
        self._copied[name] = record.sha256, key
        return key

    def _commit(self, manifest: ManifestOf) -> None:
        self._lease.check()  # again: uploads may take long
        write_manifest(self.store, manifest)
        garbage = self._manifest.keys - manifest.keys
        self._manifest, self._written_at = manifest, time.monotonic()
        self._copied.clear()
        self.state.files = len(manifest.files)
        self.state.bytes = sum(entry.bytes for entry in manifest.files.values())
        self.state.behind, self.state.updated = 0, datetime.now(UTC).isoformat(timespec="seconds")
        self._saved(self.state)
        for key in garbage:
            try:
                self.store.delete(key)
            except StoreError as error:
                logger.debug(f"{key} is left over: {error}")

    def _saved(self, state: MirrorState) -> MirrorState:
        try:
            write_json(self.run / MIRROR_FILE, asdict(state))
        except (OSError, RetrieverError) as error:
            logger.debug(f"{MIRROR_FILE} cannot be written: {error}")
        return state


_SMALL = 1 << 20
"""Files up to so many bytes are read as a whole."""


def _record_of(content: bytes) -> files.FileRecord:
    return files.FileRecord(len(content), sha256(content).hexdigest())
