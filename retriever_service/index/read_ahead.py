"""An index that is read once, from its beginning to its end, before it is searched.

An index is memory-mapped: a search reads the pages that it needs, here and there. From a network file system, or a disk
on which nothing of it was read before, the first batches take minutes that way. Read in order, the same pages come in
seconds, and all processes of the machine find them there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from retriever_service.index.store import PASSAGES_FILE, Manifest, read_manifest
from retriever_service.machine import available_memory

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30.0
_READERS = 4
"""Network file systems give several readers more than one."""
_BLOCK_BYTES = 1 << 25
_PIECE_BYTES = 1 << 20


class ByteCount:
    """How far work on many bytes is: a line of the log at its end, and every `LOG_EVERY_S` seconds until then.

    Args:
        what: is being done, for the log.
        total: bytes that there are to do.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more are done. Threads may call it at the same time."""
        with self._lock:
            self._done += count
            if time.monotonic() - self._said >= LOG_EVERY_S:
                self._say(f"{self._done:,} of {self._total:,}")

    def end(self) -> None:
        """All is done."""
        self._say(f"{self._done:,}")

    def _say(self, count: str) -> None:
        self._said = time.monotonic()
        logger.info(f"{self._what}: {count} bytes in {self._said - self._began:.1f} s")


def read_ahead(index_dir: str | Path) -> None:
    """Read the newest state of an index into the page cache, and into nothing else: vectors first, passages last.

    What does not fit into the memory that is available is left where it is, with a warning.

    Raises:
        RetrieverError: there is no index.
    """
    directory = Path(index_dir)
    manifest = read_manifest(directory)
    total, room = size_of(manifest), available_memory()
    if total > room:
        logger.warning(
            f"{directory} has {total:,} bytes and this machine has memory for {room:,}: only so many are read ahead, "
            "and searches will wait for the disk; give it more memory, or build the index smaller (a factory such as "
            "SQ8)"
        )
    count = ByteCount(f"reading {directory} ahead", min(total, room))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead") as readers:
        for read in readers.map(_read, _blocks(directory, manifest, room)):
            count.add(read)
    count.end()


def size_of(manifest: Manifest) -> int:
    """Bytes of all files."""
    return sum(record.bytes for record in manifest.files.values())


Block = tuple[Path, int, int]
"""A file, the first byte and how many."""


def _blocks(directory: Path, manifest: Manifest, room: int) -> Iterator[Block]:
    """The first `room` bytes. Passages are last: a search reads a few pages of them, and many of everything else."""
    for name in sorted(manifest.files, key=lambda name: (name.endswith(PASSAGES_FILE), name)):
        size = min(manifest.files[name].bytes, room)
        room -= size
        for start in range(0, size, _BLOCK_BYTES):
            yield directory / name, start, min(_BLOCK_BYTES, size - start)


def _read(block: Block) -> int:
    path, start, length = block
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # an update has put another one in its place
        return 0
    try:
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
        done = 0
        while done < length and (
            piece := os.pread(descriptor, min(_PIECE_BYTES, length - done), start + done)
        ):
            done += len(piece)
        return done
    finally:
        os.close(descriptor)
