"""The first stage over words: BM25 by bm25s, over title and text.

    BM25/
      *.csc.index.npy     the score of every term in every row that has it, as bm25s writes it
      *.index.json        its parameters and vocabulary
      terms.arrow         the terms, sorted: the number of a term is its place
      bm25.json           how texts were made into terms

Guarantees:
- a directory of that name is complete: it is built in `.NAME.partial` beside it, then renamed;
- the same passages give the same bytes;
- hits do not depend on the order of the query's words, nor on which other queries are searched at the same time; the
  first hits of a deep search are the hits of a shallower one;
- a row that shares no word with the query never comes;
- opening costs no load time, and the pages are shared by all processes of a machine.

What a word is: `words`. The parameters are those of Anserini's regressions on BEIR.
"""

from __future__ import annotations

import bisect
import logging
import os
import shutil
import tokenize
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_service.errors import RetrieverError
from retriever_service.files import check_disk, fsync, json_object, telling_of_room, write_json
from retriever_service.index.words import ANALYSIS, Analyser
from retriever_service.machine import available_cores
from retriever_service.passages.corpus import Passage, passage_text
from retriever_service.passages.ranked import NO_ROW, NO_SCORE, Ranked

K1, B = 0.9, 0.4
FORMAT_VERSION = 1
ABOUT_FILE, TERMS_FILE = "bm25.json", "terms.arrow"
_ABOUT = {"version": FORMAT_VERSION, "k1": K1, "b": B, **ANALYSIS}
_BYTES_PER_POSTING = 8


def build_bm25(passages: Iterable[Passage], out_dir: Path) -> None:
    """Build the word index of a corpus, whose rows are numbered in the order of `passages`.

    Memory: 4 bytes per word, and about 30 for every different word of every passage; `planner` predicts it.

    Raises:
        RetrieverError: `out_dir` exists, there are no passages, or the disk has too little room.
    """
    if out_dir.exists():
        raise RetrieverError(f"{out_dir} exists; name another directory or remove it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir()
    try:
        _write(_Tokens.of(passages), partial)
        os.replace(partial, out_dir)
        fsync(out_dir.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(tokens: _Tokens, directory: Path) -> None:
    if not len(tokens.ids):
        raise RetrieverError("no passages to build a word index of")
    index = _bm25s().BM25(k1=K1, b=B, method="lucene", backend="numba", csc_backend="scipy")
    with np.errstate(invalid="ignore"):  # the average length, in a corpus without a single word
        index.index(tokens, create_empty_token=False, show_progress=False)
    # scipy's choice of type depends on the size; one type means one compiled search.
    index.scores["indptr"] = index.scores["indptr"].astype(np.int64)
    check_disk(directory, _BYTES_PER_POSTING * len(index.scores["data"]), "the word index")
    terms = pa.record_batch({"term": pa.array(list(tokens.vocab), pa.string())})
    with telling_of_room(directory):
        index.save(directory, show_progress=False)
        with (
            pa.OSFile(str(directory / TERMS_FILE), "wb") as file,
            pa.ipc.new_file(file, terms.schema) as writer,
        ):
            writer.write_batch(terms)
        for path in directory.iterdir():
            fsync(path)
    write_json(directory / ABOUT_FILE, _ABOUT)
    fsync(directory)


# What bm25s and numpy raise of files that are not as they were written; numpy reads headers with Python's tokenizer.
_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    SyntaxError,
    RecursionError,
    tokenize.TokenError,
    pa.ArrowInvalid,
)


class Bm25:
    """Searches a word index; a `FirstStage`. Use one instance from one thread at a time.

    The first search of a process, and the first with `allowed`, compile for a few seconds; `first_search` does it
    before.
    """

    def __init__(self, index: Any, terms: pa.StringArray, num_threads: int) -> None:
        self.count: int = index.scores["num_docs"]
        """Rows of the corpus."""
        self._index = index
        self._terms = terms
        self._analyse = Analyser()
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="bm25")

    @classmethod
    def open(cls, directory: Path, *, num_threads: int | None = None) -> Bm25:
        """Open a word index of `build_bm25`.

        Args:
            num_threads: over which the queries of a batch are spread; None for the processors of this process.

        Raises:
            RetrieverError: it is missing, damaged or of another version.
        """
        mend = "build the index again"
        try:
            about = json_object((directory / ABOUT_FILE).read_bytes())
            index = _bm25s().BM25.load(directory, mmap=True, load_vocab=False, show_progress=False)
            terms = pa.ipc.open_file(pa.memory_map(str(directory / TERMS_FILE))).get_batch(0).column(0)
        except _DAMAGED as error:
            raise RetrieverError(
                f"{directory}: not a word index, or a damaged one ({error!s:.200}); {mend}"
            ) from error
        if about != _ABOUT:
            raise RetrieverError(
                f"{directory}: a word index made as {about!s:.300}, this program reads {_ABOUT}; {mend}"
            )
        scores, terms_end = index.scores, len(terms) + 1
        are_whole = isinstance(scores["num_docs"], int) and len(scores["indptr"]) == terms_end
        if not are_whole or scores["indptr"][-1] != len(scores["data"]):
            raise RetrieverError(f"{directory}: the files of this word index do not belong together; {mend}")
        index.unique_token_ids_set = range(len(terms))  # what bm25s takes query terms for known by
        return cls(index, terms, num_threads or available_cores())

    def first_search(self) -> None:
        """Compile whatever searches will need."""
        if len(self._terms):
            for weights in (None, np.ones(self.count, np.float32)):
                self._retrieve([[0]], 1, weights)

    def search(self, queries: Sequence[str], depth: int, allowed: npt.NDArray[np.bool_] | None) -> Ranked:
        """The best `depth` rows of each query among the allowed ones; see `ranked.FirstStage`."""
        scores = np.full((len(queries), depth), NO_SCORE, dtype=np.float32)
        rows = np.full((len(queries), depth), NO_ROW, dtype=np.int64)
        asked = [self._term_numbers(query) for query in queries]
        weights = None if allowed is None else allowed.astype(np.float32)
        answerable = [number for number, terms in enumerate(asked) if terms]
        # bm25s's own threads would end the process if another thread used numba at the same time.
        parts = [answerable[start :: self._num_threads] for start in range(self._num_threads)]
        jobs = [(part, [asked[number] for number in part]) for part in parts if part]
        for (part, _), found in zip(
            jobs, self._pool.map(lambda job: self._retrieve(job[1], depth, weights), jobs), strict=True
        ):
            scores[part], rows[part] = found.scores, found.rows
        return Ranked(scores, rows)

    def _term_numbers(self, query: str) -> list[int]:
        """The numbers of the query's terms that the index knows, ascending; a term as often as it comes."""
        numbers = []
        for term in self._analyse(query):
            number = bisect.bisect_left(self._terms, term, key=pa.StringScalar.as_py)
            if number < len(self._terms) and self._terms[number].as_py() == term:
                numbers.append(number)
        return sorted(numbers)

    def _retrieve(
        self, queries: list[list[int]], depth: int, weights: npt.NDArray[np.float32] | None
    ) -> Ranked:
        # One more than asked for shows where the last place is tied: there bm25s keeps any of the equal rows.
        wanted = min(depth + 1, self.count)
        found = self._index.retrieve(queries, k=wanted, show_progress=False, weight_mask=weights)
        ranked = Ranked.best(np.where(found.scores > 0, found.scores, NO_SCORE), found.documents, depth + 1)
        last, next_ = ranked.scores[:, depth - 1], ranked.scores[:, depth]
        for number in np.flatnonzero((last == next_) & (last > 0)):
            exact = self._retrieve_exactly(queries[number], depth, weights)
            ranked.scores[number, :depth], ranked.rows[number, :depth] = exact.scores[0], exact.rows[0]
        return ranked.top(depth)

    def _retrieve_exactly(
        self, query: list[int], depth: int, weights: npt.NDArray[np.float32] | None
    ) -> Ranked:
        """As `_retrieve`, for one query that more than `depth` rows match: equal scores by row, to the last place."""
        scores = self._index.get_scores_from_ids(query, weight_mask=weights)
        rows = np.flatnonzero(scores >= np.partition(scores, -depth)[-depth])
        return Ranked.best(scores[rows][None], rows[None], depth)


class _Tokens:
    """The corpus as bm25s takes it: `ids`, the numbers of the terms of every row, and `vocab`, number by term."""

    def __init__(self, ids: _TokenRows, vocab: dict[str, int]) -> None:
        self.ids = ids
        self.vocab = vocab

    @classmethod
    def of(cls, passages: Iterable[Passage]) -> _Tokens:
        analyse = Analyser()
        numbers: dict[str, int] = {}
        tokens, ends = array("i"), array("q")
        for passage in passages:
            tokens.extend(numbers.setdefault(term, len(numbers)) for term in analyse(passage_text(passage)))
            ends.append(len(tokens))
        # In sorted order a term is found without a table of all terms in memory.
        vocab = {term: place for place, term in enumerate(sorted(numbers))}
        places = np.array([vocab[term] for term in numbers], dtype=np.int32)
        return cls(_TokenRows(places[np.asarray(tokens, dtype=np.int32)], np.array(ends)), vocab)


class _TokenRows:
    """A list of lists of numbers in 4 bytes a number; as lists of Python they would take ten times as much."""

    def __init__(self, tokens: npt.NDArray[np.int32], ends: npt.NDArray[np.int64]) -> None:
        self._tokens = tokens
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self._ends.tolist():
            yield self._tokens[start:end].tolist()
            start = end


def _bm25s() -> Any:
    import multiprocessing.synchronize  # noqa: F401 - bm25s's first progress bar would, in the middle of an update

    import bm25s

    # It sets its own logger to DEBUG, which would show through every handler.
    logging.getLogger("bm25s").setLevel(logging.INFO)
    return bm25s
