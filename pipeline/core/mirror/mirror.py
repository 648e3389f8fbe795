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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.mirror.lease import BEAT_S, Lease, LeaseLost
from pipeline.core.mirror.manifest import Entry, ManifestOf, read_manifest, write_manifest
from pipeline.core.mirror.restore import AT_ONCE, CONFIGURATION, restore
from pipeline.core.mirror.scan import Found, State, checkpoint_of, complete_files, state_of
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
    """Files were replaced or went while they were uploaded: the directory has to be looked through again."""


class _GivenUp(Exception):
    """An upload was not begun: another one failed, or the time for what is left is over."""


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
        self._written: set[str] = set()
        """All objects that were begun since the last manifest."""
        self._overtaken: Counter[str | None] = Counter()
        """How often a checkpoint was replaced while it was uploaded."""
        self._known: dict[str, tuple[State, files.FileRecord]] = {}
        self._manifest, self._written_at = ManifestOf(""), 0.0
        self._stop, self._is_left, self._is_lost = threading.Event(), threading.Event(), False
        self._deadline, self._is_whole = float("inf"), False
        self._has_failed = threading.Event()
        """Whether an upload of this look did: the others wait for the next one."""
        self.restored: str | None = None
        """What `begin` restored, for a log that begins later."""
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
                self._heart.start()
                manifest = read_manifest(self.store)
            self.state = self._enter(manifest)
        except BaseException as error:
            self.leave()
            if isinstance(error, LeaseLost):
                raise UserError(str(error)) from error
            if isinstance(error, StoreError):
                raise UserError(
                    f"storage.url cannot be used: {error}. Look at the address, the bucket and the credentials"
                ) from error
            raise

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
                left_out = restore(self.store, manifest, self.run)
            self.restored = f"{len(manifest.files) - len(left_out)} files restored from {self.store.url}"
            # From now on the copy is of this directory: another one that it was of is behind.
            self._lease.check()
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
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Upload what is left.

        Raises:
            UserError: that cannot be done; not where the block ends by an exception.
        """
        seconds = END_S if kind is None else CUT_OFF_S
        self._deadline = time.monotonic() + seconds
        self._stop.set()
        with self._status(f"uploading what is left to {self.store.url}"):
            # Not for longer: the threads end with the process, also where a store does not answer.
            self._thread.join(seconds)
            self.leave()
        if self._is_whole:
            return
        error = self.state.last_error or f"an upload did not end within {seconds:g} s"
        message = (
            f"the copy at {self.store.url} is not whole, {self.state.behind} files are missing ({error}). The run "
            f"directory {self.run} is: the same command uploads what is left"
        )
        if kind is None:
            raise UserError(message)
        logger.warning(message)

    def leave(self) -> None:
        """Give the URL to the next process, if it was taken and nothing of this one may still be written there."""
        self._is_left.set()
        if self._heart.is_alive():
            self._heart.join(BEAT_S)
        if self._heart.ident is None or self._heart.is_alive() or self._thread.is_alive():
            return
        try:
            self._lease.release()
        except (StoreError, LeaseLost) as error:
            logger.debug(f"{self.store.url} could not be left: {error}")

    def _work(self) -> None:
        backoff, failures, pause = Backoff(2.0), 0, 0.0
        while not self._stop.wait(pause) and not self._is_lost:
            is_done = self._attempt()
            failures = 0 if is_done else failures + 1
            pause = PERIOD_S if is_done else min(backoff.pause_s(failures), MOST_PAUSE_S)
        backoff, failures = Backoff(1.0), 0
        while not self._is_lost and time.monotonic() < self._deadline:
            if self._attempt(at_end=True):
                self._is_whole = True
                return
            failures += 1
            pause = min(backoff.pause_s(failures), MOST_PAUSE_S)
            time.sleep(max(0.0, min(pause, self._deadline - time.monotonic())))

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
        except _GivenUp:
            return False
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
        self._has_failed.clear()
        with ThreadPool(AT_ONCE) as threads:  # of daemons: an upload that hangs does not keep the process
            keys = threads.map(lambda name: self._upload(name, found[name], records[name]), new, chunksize=1)
        entries = {name: old[name] for name in found if name not in new}
        for name, key in zip(new, keys, strict=True):
            if key is not None:
                entries[name] = Entry(**asdict(records[name]), key=key, mtime=found[name].state[1] / 1e9)
        behind = self._go_back(entries, [name for name, key in zip(new, keys, strict=True) if key is None])
        self._commit(ManifestOf(self.state.id, entries), behind)

    def _go_back(self, entries: dict[str, Entry], moved: Sequence[str]) -> int:
        """Let the copy keep the checkpoint that it has, where files of a newer one moved; how many files did.

        A checkpoint may be replaced sooner than a slow store takes it, and the copy of all else is not to wait for it.

        Raises:
            _Moved: other files did.
        """
        checkpoints = {checkpoint_of(name) for name in moved}
        for checkpoint in checkpoints:
            # That of a version that is trained goes when it is needed no more, and no other one stands for it.
            if checkpoint is None or f"{Path(checkpoint).parent}/train.json" in entries:
                raise _Moved
        for checkpoint in checkpoints:
            for name in [name for name in entries if checkpoint_of(name) == checkpoint]:
                del entries[name]
            old = self._manifest.files
            entries |= {name: entry for name, entry in old.items() if checkpoint_of(name) == checkpoint}
            self._overtaken[checkpoint] += 1
            if self._overtaken[checkpoint] == 2:
                logger.warning(
                    f"{checkpoint} was replaced again while it was uploaded to {self.store.url}, whose copy of it is "
                    "older, or missing; a longer learner.checkpoint_minutes mends that"
                )
        return len(moved)

    def _record(self, name: str, file: Found) -> files.FileRecord:
        if name not in self._known or self._known[name][0] != file.state or file.content is not None:
            record = files.record_file(file.path) if file.content is None else _record_of(file.content)
            self._known[name] = file.state, record
        return self._known[name][1]

    def _upload(self, name: str, file: Found, record: files.FileRecord) -> str | None:
        """The object that has it now; None if the file was replaced or went meanwhile."""
        if self._has_failed.is_set() or time.monotonic() >= self._deadline:
            raise _GivenUp
        checksum, key = self._copied.get(name, ("", ""))
        if checksum == record.sha256:
            return key
        key = self._manifest.key_for(name, record.sha256)
        content = file.content
        try:
            if content is None and record.bytes <= _SMALL:
                content = file.path.read_bytes()
                if _record_of(content) != record:
                    return None
            self._written.add(key)
            if content is not None:
                self.store.write(key, content)
            else:
                self.store.upload(file.path, key)
                if state_of(file.path) != file.state:
                    return None
        except (FileNotFoundError, StoreError):
            if file.path.exists():
                self._has_failed.set()
                raise
            return None
        self._copied[name] = record.sha256, key
        return key

    def _commit(self, manifest: ManifestOf, behind: int) -> None:
        self._lease.check()  # again: uploads may take long
        write_manifest(self.store, manifest)
        garbage = (self._manifest.keys | self._written) - manifest.keys
        self._manifest, self._written_at = manifest, time.monotonic()
        self._copied.clear()
        self._written.clear()
        self.state.files = len(manifest.files)
        self.state.bytes = sum(entry.bytes for entry in manifest.files.values())
        self.state.behind, self.state.updated = behind, datetime.now(UTC).isoformat(timespec="seconds")
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
