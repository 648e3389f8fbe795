"""Files that are whole or absent, and what they are known by afterwards."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from retriever_service.errors import RetrieverError


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of a finished file."""

    bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Read `path` once and describe it."""
    with open(path, "rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def record_directory(directory: Path) -> dict[str, FileRecord]:
    """All files below `directory`, by their path from there."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): record_file(path) for path in paths}


def records_as_json(records: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    """Records by name, for a JSON file; `records_from_json` reads them."""
    return {name: asdict(record) for name, record in records.items()}


def records_from_json(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    """What `records_as_json` gave."""
    return {name: FileRecord(**fields) for name, fields in tree.items()}


def check_size(path: Path, record: FileRecord, mend: str) -> None:
    """Refuse a file that is missing or cut short; cheap, reads no contents.

    Raises:
        RetrieverError: says what is wrong, and `mend`.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != record.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise RetrieverError(f"{path} {found}, expected {record.bytes} bytes; {mend}")


def check_contents(path: Path, record: FileRecord, mend: str) -> None:
    """As `check_size`, and every byte is read.

    Raises:
        RetrieverError: the file is missing, cut short or changed.
    """
    check_size(path, record, mend)
    if record_file(path) != record:
        raise RetrieverError(f"{path} was changed since it was written (its SHA-256 differs); {mend}")


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete and on the disk; a failure leaves nothing of it.

    Raises:
        RetrieverError: the disk is full, or the file may not grow so large.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with telling_of_full_disk(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def telling_of_full_disk(path: Path) -> Iterator[None]:
    """A disk that is full while `path` is made, folders and locks included, as the error of a user who can make room.

    Raises:
        RetrieverError: the disk is full, or a file may not grow so large.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RetrieverError(
                f"{path}: the disk is full; make room and run the same command again"
            ) from error
        if error.errno == errno.EFBIG:
            raise RetrieverError(
                f"{path} may not grow so large (ulimit -f); raise the limit and run the same command again"
            ) from error
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    with writing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_array(file: BinaryIO, values: npt.NDArray[Any]) -> None:
    """Write an array in numpy's format.

    Not by `numpy.save`: its writing tells of a full disk without saying so (no errno).
    """
    description = np.lib.format.header_data_from_array_1_0(values)  # type: ignore[no-untyped-call]
    np.lib.format.write_array_header_1_0(file, description)  # type: ignore[no-untyped-call]
    file.write(np.ascontiguousarray(values).data)


@contextmanager
def telling_of_room(path: Path) -> Iterator[None]:
    """Whatever a library raises when it cannot write `path`, as the error of a user who can make room.

    Raises:
        RetrieverError: says how much room there was.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free
        raise RetrieverError(
            f"{path} cannot be written ({error}); {free:,} bytes were free. Make room and run the same again"
        ) from error


def fsync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_disk(directory: Path, needed: int, what: str) -> None:
    """Refuse work that will not fit. `directory`, or one above it, exists.

    Raises:
        RetrieverError: fewer than `needed` bytes are free there.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RetrieverError(f"{directory}: {what} needs about {needed:,} bytes of disk, {free:,} are free")


@contextmanager
def exclusive(lock_file: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends.

    Args:
        wait: until nobody else holds it.

    Raises:
        RetrieverError: another process holds it.
    """
    with open(lock_file, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RetrieverError(f"another process is working on {lock_file.parent}; wait for it") from error
        yield
