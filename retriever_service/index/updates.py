"""Adding passages to an index and deleting them, without building it again.

Guarantees:
- an update is on disk when the function returns, and whole or absent whatever happens before;
- readers see the state before or the state after, never one between; open ones go on with theirs;
- one update at a time per index, across processes;
- an update that cannot be made changes nothing;
- what is copied from old files into new ones is compared with its checksum first: damage does not spread.

Passages that were added are searched exactly: they form Flat segments, whatever the index was built as. Small ones
are merged, so that there are never many.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retriever_service.encoding.encoder import TextEncoder
from retriever_service.errors import RetrieverError
from retriever_service.files import (
    check_contents,
    exclusive,
    record_file,
    telling_of_full_disk,
    write_array,
    writing,
)
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.store import (
    FLAT,
    MEND,
    Manifest,
    OpenIndex,
    Segment,
    check_encoder,
    files_below,
    open_index,
    read_manifest,
    verify_checksums,
    write_manifest,
    write_segment,
)
from retriever_service.passages.corpus import Corpus, Passage, write_passages

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
MOST_PASSAGES_WITH_WORDS = 1_000_000
"""Above this an addition to an index with a word index is refused: it would be built anew, for minutes."""


def add_passages(
    index_dir: str | Path, passages: Iterable[Passage], encoder: TextEncoder, *, verify: bool = False
) -> Manifest:
    """Add passages; the id of a deleted one may come again.

    Args:
        verify: read every byte of the index first, and leave it alone if it is damaged.

    Raises:
        RetrieverError: nothing to add, an id that is there already or comes twice, a passage without text,
            another encoder, an index whose word index is too large to be built anew, a full disk, or damage.
    """
    new = list(passages)
    _check(new)
    with _updating(Path(index_dir), verify) as index:
        check_encoder(index.manifest, encoder, index_dir)
        if taken := _rows_of(index, [passage.id for passage in new]):
            raise RetrieverError(
                f"{index_dir} has a passage {next(iter(taken))!r} already (of {len(taken)} such ids); delete it "
                "first, or give the new one its own id"
            )
        if index.manifest.bm25 is not None and index.manifest.count > MOST_PASSAGES_WITH_WORDS:
            raise RetrieverError(
                f"{index_dir} has a word index over {index.manifest.count:,} passages, which every addition "
                f"would build anew (limit {MOST_PASSAGES_WITH_WORDS:,}); build the index again, or without --bm25"
            )
        return _replace(
            index, segments=_append(index, new, np.concatenate(list(encoder.encode_passages(new))))
        )


def delete_passages(index_dir: str | Path, ids: Sequence[str], *, verify: bool = False) -> Manifest:
    """Delete passages; their rows stay, as tombstones, until the index is built again.

    Args:
        verify: see `add_passages`.

    Raises:
        RetrieverError: nothing to delete, an id that is not there, a full disk, or damage.
    """
    if not ids:
        raise RetrieverError("no ids of passages to delete")
    with _updating(Path(index_dir), verify) as index:
        rows = _rows_of(index, ids)
        if missing := [id_ for id_ in ids if id_ not in rows]:
            raise RetrieverError(f"{index_dir} has no passage {missing[0]!r} (of {len(missing)} such ids)")
        if len(rows) == index.manifest.num_passages:
            raise RetrieverError(f"{index_dir}: these are all of its passages; remove the directory instead")
        return _replace(index, deleted=list(rows.values()))


def _check(passages: Sequence[Passage]) -> None:
    if not passages:
        raise RetrieverError("no passages to add")
    for passage in passages:
        if not passage.id or not passage.text.strip():
            raise RetrieverError(f"passage {passage.id!r}: a passage needs an id and a text")
        try:
            f"{passage.id}{passage.title}{passage.text}".encode()
        except UnicodeEncodeError as error:
            raise RetrieverError(f"passage {passage.id!r} is not valid Unicode: {error}") from error
    id_, times = Counter(passage.id for passage in passages).most_common(1)[0]
    if times > 1:
        raise RetrieverError(f"passage {id_!r} comes {times} times; give every passage its own id")


@contextmanager
def _updating(directory: Path, verify: bool) -> Iterator[OpenIndex]:
    """The index, while nobody else changes it; what an update that was cut off left behind is removed."""
    if not directory.is_dir():
        open_index(directory)  # refuses it
    with telling_of_full_disk(directory), exclusive(directory / LOCK_FILE):
        index = open_index(directory)
        if verify:
            verify_checksums(directory)
        _remove_unused(index.manifest, directory)
        try:
            yield index
        except BaseException:
            # What was made until then takes room, which may be just what there was too little of.
            _remove_unused(read_manifest(directory), directory)
            raise


def _rows_of(index: OpenIndex, ids: Sequence[str]) -> dict[str, int]:
    """The rows of those ids that can be found."""
    column = index.corpus.column("id")
    rows = np.flatnonzero(pc.is_in(column, value_set=pa.array(ids, pa.string())).to_numpy())
    if index.alive is not None:
        rows = rows[index.alive[rows]]
    return {column[int(row)].as_py(): int(row) for row in rows}


def _append(
    index: OpenIndex, passages: Sequence[Passage], vectors: npt.NDArray[np.float32]
) -> tuple[Segment, ...]:
    """The segments with one more, into which the last ones are merged as long as they are no larger than it.

    So the number of segments grows with the logarithm of what was added, and every passage is copied as often.
    """
    kept = list(index.manifest.segments)
    merged: list[faiss.Index] = []
    count = len(passages)
    while kept and kept[-1].factory == FLAT and kept[-1].count <= count:
        segment = kept.pop()
        _check_before_copying(index, segment.index_file, segment.passages_file)
        count += segment.count
        merged.insert(0, index.segments[len(kept)])
    first = sum(segment.count for segment in kept)
    flat = faiss.index_factory(index.manifest.dimension, FLAT, faiss.METRIC_INNER_PRODUCT)
    for old in merged:
        flat.add(old.reconstruct_n(0, old.ntotal))
    flat.add(np.ascontiguousarray(vectors))
    number = 1 + max(int(Path(segment.name).name) for segment in index.manifest.segments)
    old_passages = (index.corpus[row] for row in range(first, len(index.corpus)))
    segment = write_segment(
        index.directory, number, flat, FLAT, partial(write_passages, chain(old_passages, passages))
    )
    return (*kept, segment)


def _check_before_copying(index: OpenIndex, *names: str) -> None:
    for name in names:
        check_contents(index.directory / name, index.manifest.files[name], MEND)


def _replace(
    index: OpenIndex, *, segments: tuple[Segment, ...] | None = None, deleted: Sequence[int] = ()
) -> Manifest:
    """Make the next state the index's state."""
    old, directory = index.manifest, index.directory
    generation = old.generation + 1
    tombstones, bm25 = old.tombstones, old.bm25
    if deleted:
        gone = np.flatnonzero(~index.alive) if index.alive is not None else np.empty(0, np.int64)
        tombstones = f"tombstones-{generation}.npy"
        with writing(directory / tombstones) as file:
            write_array(file, np.union1d(gone, deleted).astype(np.int64))
    if segments is not None and bm25 is not None:
        bm25 = f"bm25-{generation}"
        _check_before_copying(index, *(s.passages_file for s in segments if s in old.segments))
        build_bm25(Corpus(*(directory / s.passages_file for s in segments)), directory / bm25)
    segments = segments or old.segments
    names = [name for s in segments for name in (s.index_file, s.passages_file)]
    names += [tombstones] if tombstones else []
    names += files_below(directory, bm25) if bm25 else []
    manifest = dataclasses.replace(
        old,
        generation=generation,
        count=sum(segment.count for segment in segments),
        num_deleted=old.num_deleted + len(deleted),
        segments=segments,
        tombstones=tombstones,
        bm25=bm25,
        files={name: old.files.get(name) or record_file(directory / name) for name in names},
    )
    write_manifest(manifest, directory)
    _remove_unused(manifest, directory)
    return manifest


def _remove_unused(manifest: Manifest, directory: Path) -> None:
    """Remove files of states that are no more. Whoever has them open keeps them until he closes them."""
    used = {segment.name for segment in manifest.segments} | {manifest.tombstones, manifest.bm25}
    for path in chain(
        directory.glob("segments/*"), directory.glob("tombstones-*.npy"), directory.glob("bm25-*"),
        directory.glob("segments/.*.tmp"),
    ):  # fmt: skip
        if str(path.relative_to(directory)) not in used:
            logger.info(f"removing {path}, which the index does not use any more")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
