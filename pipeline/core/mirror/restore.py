"""From the copy back into a run directory: what is as it was written, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.mirror.lease import is_fresh
from pipeline.core.mirror.manifest import MANIFEST, Entry, ManifestOf, read_manifest
from pipeline.core.mirror.store import Store, StoreError
from retriever_service import files
from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

AT_ONCE = 4
"""Files that are on their way at the same time."""
ATTEMPTS = 3
CONFIGURATION = "config.yaml"
_SMALL = 1 << 20
"""Bytes of a file that tells something."""


def restore(
    store: Store,
    manifest: ManifestOf,
    run: Path,
    wanted: Callable[[str, Entry], bool] = lambda name, entry: True,
) -> list[str]:
    """Fill a run directory; files that are there already, as the copy has them, stay.

    Returns:
        what was left out, because its object is missing or damaged. The run does again what is missing.

    Raises:
        UserError: the configuration is damaged, or the disk has no room.
        StoreError: the store is out of reach.
    """
    entries = {name: entry for name, entry in manifest.files.items() if wanted(name, entry)}
    missing = {name: entry for name, entry in entries.items() if not _is_there(run / name, entry)}
    try:
        files.check_disk(run, sum(entry.bytes for entry in missing.values()), f"the copy at {store.url}")
    except RetrieverError as error:
        raise UserError(str(error)) from error
    with ThreadPoolExecutor(AT_ONCE) as threads:
        problems = list(threads.map(lambda item: _fetch(store, run, *item), missing.items()))
    damaged = [name for name, problem in zip(missing, problems, strict=True) if problem is not None]
    for problem in filter(None, problems):
        logger.warning(f"{store.url}: {problem}; it is not restored, and done again where it is needed")
    if CONFIGURATION in damaged:
        raise UserError(f"{store.url}: {CONFIGURATION} of the copy is damaged; choose another storage.url")
    return damaged


def fetch_small_files(url: str, folder: Path) -> bool:
    """What tells how the run at a URL stands, without its data; whether a process seems to work on it.

    Raises:
        UserError: there is no copy of a run, or the store is out of reach.
    """
    store = Store(url)
    try:
        if (manifest := read_manifest(store)) is None:
            raise UserError(f"{url} holds no copy of a run (no {MANIFEST})")
        restore(
            store,
            manifest,
            folder,
            lambda name, entry: entry.bytes <= _SMALL and not name.endswith(".parquet"),
        )
        return bool(is_fresh(store))
    except StoreError as error:
        raise UserError(f"{url} cannot be read: {error}") from error


def _is_there(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and files.record_file(path) == entry.record


def _fetch(store: Store, run: Path, name: str, entry: Entry) -> str | None:
    """Get one file; what is wrong with it, if it is not as it was written."""
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.restored.tmp")
    problem = ""
    for attempt in range(ATTEMPTS):
        try:
            store.download(entry.key, temporary)
            files.check_contents(temporary, entry.record, "it is damaged")
        except StoreError as error:
            problem = str(error)
            if attempt == ATTEMPTS - 1 and not isinstance(error.__cause__, FileNotFoundError):
                raise
        except RetrieverError as error:
            problem = f"{name}: {error}"
        else:
            files.fsync(temporary)
            os.utime(temporary, (entry.mtime, entry.mtime))
            os.replace(temporary, path)
            return None
        finally:
            temporary.unlink(missing_ok=True)
    return problem
