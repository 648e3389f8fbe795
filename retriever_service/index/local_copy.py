"""A copy of an index on a disk of this machine's own, searched in place of one on a network file system.

    FOLDER/
      lock             held while a copy is made
      index-3f9a.../   an index directory (see `store`), named after the fingerprint of the index

Guarantees:
- a directory of that name is complete: it is made in `.NAME.partial` beside it, every file compared with its checksum
  on the way, then renamed;
- processes of one machine make a copy once; the others wait for it;
- a copy of another state of the index is never taken for it, and one with a file missing or cut short is made anew;
- before a copy is made those that no process holds are removed, so that a run that indexes again and again does not
  fill the disk. Nothing else in the folder is touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from retriever_service.errors import RetrieverError
from retriever_service.files import FileRecord, check_disk, check_size, exclusive, fsync, writing
from retriever_service.index.read_ahead import ByteCount, size_of
from retriever_service.index.store import MANIFEST_FILE, MEND, Manifest, read_manifest, write_manifest

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
_OURS = re.compile(r"index-[0-9a-f]{64}|\.index-[0-9a-f]{64}\.partial")
_COPIERS = 4
"""Files that are copied at the same time."""
_PIECE_BYTES = 1 << 20


class LocalCopy:
    """A copy that is there, and stays as long as this object.

    Args:
        index_dir: a built index.
        folder: of the copies of this machine.

    Raises:
        RetrieverError: no index, a damaged one, a folder that cannot be written, or too little room on its disk.
    """

    def __init__(self, index_dir: str | Path, folder: str | Path) -> None:
        source, home = Path(index_dir), Path(folder)
        manifest = read_manifest(source)
        self.directory = home / f"index-{manifest.fingerprint}"
        try:
            home.mkdir(parents=True, exist_ok=True)
            with exclusive(home / LOCK_FILE, wait=True):
                if not _is_whole(self.directory, manifest):
                    _remove_unused(home)
                    _copy(source, manifest, self.directory)
                self._held = (self.directory / MANIFEST_FILE).open()
                fcntl.flock(self._held, fcntl.LOCK_SH)
        except OSError as error:
            raise RetrieverError(f"{source} cannot be copied to {home} ({error})") from error


def _is_whole(directory: Path, manifest: Manifest) -> bool:
    try:
        if read_manifest(directory) != manifest:
            return False
        for name, record in manifest.files.items():
            check_size(directory / name, record, MEND)
    except RetrieverError:
        return False
    return True


def _remove_unused(home: Path) -> None:
    for path in home.iterdir():
        if _OURS.fullmatch(path.name) and not _is_held(path):
            logger.info(f"removing {path}, which no process uses any more")
            shutil.rmtree(path)


def _is_held(copy: Path) -> bool:
    try:
        with exclusive(copy / MANIFEST_FILE):
            return False
    except RetrieverError:
        return True


def _copy(source: Path, manifest: Manifest, directory: Path) -> None:
    check_disk(directory.parent, size_of(manifest), f"a copy of {source}")
    partial = directory.with_name(f".{directory.name}.partial")
    partial.mkdir()
    count = ByteCount(f"copying {source} to {directory}", size_of(manifest))
    try:
        with ThreadPoolExecutor(_COPIERS, thread_name_prefix="local-copy") as copiers:
            jobs = [
                copiers.submit(_copy_file, source / name, partial / name, record, count)
                for name, record in manifest.files.items()
            ]
            for job in jobs:
                job.result()
        write_manifest(manifest, partial)
        shutil.rmtree(directory, ignore_errors=True)  # a damaged one that another process still holds
        os.replace(partial, directory)
        fsync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count.end()


def _copy_file(source: Path, target: Path, record: FileRecord, count: ByteCount) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(source, "rb") as file, writing(target) as copy:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            copy.write(piece)
            count.add(len(piece))
    check_size(target, record, MEND)
    if digest.hexdigest() != record.sha256:
        raise RetrieverError(f"{source} was changed since it was written (its SHA-256 differs); {MEND}")
