"""What a mirror holds: the one object that says which others belong to the copy, with their sizes and checksums.

It is replaced as a whole, behind the objects that it names, so the copy is at every instant one that the run directory
once was. An object that a manifest names is never overwritten: models, Parquet files and indexes, which do not change,
lie under their own path, everything else under a name made of its contents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pipeline.core.errors import UserError
from pipeline.core.mirror.store import Store
from retriever_service.files import FileRecord, json_object

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the copy."""

    bytes: int
    sha256: str
    key: str
    """Name of the object."""
    mtime: float
    """Of the file, in seconds since 1970."""

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.bytes, self.sha256)


@dataclass(frozen=True, slots=True)
class ManifestOf:
    """The copy that a writer left."""

    writer: str
    """Id of the run directory that it is of."""
    files: Mapping[str, Entry] = field(default_factory=dict)
    """By path from the run directory."""

    @property
    def keys(self) -> set[str]:
        return {entry.key for entry in self.files.values()}

    def key_for(self, path: str, sha256: str) -> str:
        """A name for new contents of a file, which no object of this copy has with others."""
        changes = not (path.endswith(".parquet") or {"model", "index"} & set(path.split("/")[:-1]))
        return f"versions/{sha256[:16]}/{path}" if changes or path in self.keys else path


def read_manifest(store: Store) -> ManifestOf | None:
    """None where there is no copy.

    Raises:
        UserError: it is damaged.
        StoreError: the store is out of reach.
    """
    if (content := store.read(MANIFEST)) is None:
        return None
    try:
        tree = json_object(content)
        return ManifestOf(tree["writer"], {path: Entry(**entry) for path, entry in tree["files"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{store.url}/{MANIFEST} is damaged ({error!r:.200}); restore an earlier version of that object, or choose "
            "another storage.url"
        ) from error


def write_manifest(store: Store, manifest: ManifestOf) -> None:
    """Make this the copy."""
    files = {path: asdict(entry) for path, entry in sorted(manifest.files.items())}
    store.write(MANIFEST, json.dumps({"version": 1, "writer": manifest.writer, "files": files}).encode())
