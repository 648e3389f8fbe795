"""Where an index is made before it is one: a directory beside it, which a build that was cut off leaves to the next.

Guarantee: what is taken up again is what was made; it is compared with its checksums.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retriever_service.encoding.vectors import read_record
from retriever_service.errors import RetrieverError
from retriever_service.files import (
    FileRecord,
    check_contents,
    exclusive,
    fsync,
    record_file,
    telling_of_full_disk,
    write_json,
)
from retriever_service.index.store import MANIFEST_FILE, Manifest, files_below, write_manifest

JOB_FILE, INDEX_DIR = "job.json", "index"


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """The directory beside `out` where it is built; stays if the build is cut off, for the next one to go on."""
    work = out.parent / f".{out.name}.partial"
    with telling_of_full_disk(out):
        work.mkdir(parents=True, exist_ok=True)
        with exclusive(work / "lock"):
            try:
                yield work
            except BaseException:
                if {path.name for path in work.iterdir()} == {"lock"}:  # nothing to go on with
                    shutil.rmtree(work)
                raise
            shutil.rmtree(work)


def check_job(file: Path, job: dict[str, Any]) -> None:
    """Refuse to go on with a build of something else."""
    if not file.exists():
        write_json(file, job)
        return
    begun = read_record(file, dict[str, Any], f"remove {file.parent} and build again")
    if differing := [
        f"{key} {begun.get(key)!r} -> {value!r}" for key, value in job.items() if begun.get(key) != value
    ]:
        raise RetrieverError(
            f"{file.parent} holds an unfinished build of another index ({', '.join(differing)}). Finish that one with "
            "its own command, or remove the directory"
        )


def once(work: Path, root: Path, name: str, make: Callable[[], object]) -> dict[str, FileRecord]:
    """Make a file or directory of `root`, or take up what a build that was cut off has made of it.

    Returns:
        Its files, by their paths within `root`.

    Raises:
        RetrieverError: it was changed since it was made.
    """
    mend = f"remove {work} and build again"
    record = work / f"{name.replace('/', '-')}.json"
    path = root / name
    if not record.exists():
        if path.is_dir():
            shutil.rmtree(path)
        make()
        names = files_below(root, name) if path.is_dir() else [name]
        made = {file: record_file(root / file) for file in names}
        write_json(record, {file: dataclasses.asdict(it) for file, it in made.items()})
        return made
    left = read_record(record, dict[str, FileRecord], mend)
    for file, it in left.items():
        check_contents(root / file, it, mend)
    return left


def check_target(out: Path) -> None:
    if out.exists() and not (out / MANIFEST_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RetrieverError(f"{out} exists and is not an index; name another directory or remove it")


def publish(manifest: Manifest, directory: Path, out: Path) -> None:
    """Make `directory` the index `out`, all at once."""
    write_manifest(manifest, directory)
    if out.exists():
        out.rmdir()  # empty: `check_target`
    os.replace(directory, out)
    fsync(out.parent)
