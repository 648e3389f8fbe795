"""One engine in each of several processes, as one engine: a batch is divided among them.

A small encoder spends much of its time in Python, between one matrix product and the next: processes of one thread each
keep all cores busy where one process of several threads does not, and none of it competes with the event loop for the
interpreter. The index is mapped, so that they share its pages.

Guarantees:
- an answer is that of one engine, for all of them search the same state: updates are made by one of them and taken up
  by the others before they are acknowledged;
- a process that died is replaced; only the batch that it had in hand fails, with `RetrieverUnavailable`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.machine import available_cores
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions, check_request
from retriever_service.processes import OnProgress, WorkerDied, WorkerProcess
from retriever_service.search.engine import SearchEngine
from retriever_service.service.lifecycle import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")
Task = Callable[[Engine, OnProgress], T]
Found = tuple[list[list[Hit]], list[tuple[str, float]]]
"""Hits of each query, and names and seconds of the stages."""
_REFRESH_ATTEMPTS = 5
_MOST_BY_DEFAULT = 4
"""Processes, for each takes the memory of an encoder."""


def engine_opener(
    index_dir: str | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    processes: int | None = None,
    **options: Any,
) -> Callable[[], Engine]:
    """How to open an index to be served: in this process, or in several. A script that serves in several needs its
    `if __name__ == "__main__":`.

    Args:
        threads: CPU threads of all processes together; None for all cores.
        processes: None for one per thread, at most `_MOST_BY_DEFAULT`; on a GPU for this process alone.
        options: further ones of `SearchEngine.open`.

    Raises:
        RetrieverError: there are less than one of either, or more processes than threads.
    """
    on_cpu = device == "cpu"
    if threads is None:
        threads = available_cores()
    if processes is None:
        processes = min(threads, _MOST_BY_DEFAULT) if on_cpu else 1
    if not 1 <= processes <= threads:
        raise RetrieverError(f"{processes} processes cannot share {threads} threads: each needs at least one")
    each = threads // processes if on_cpu else None
    open_one = partial(SearchEngine.open, index_dir, device=device, num_threads=each, **options)
    return open_one if processes == 1 else partial(EngineProcesses, open_one, processes, each)


class EngineProcesses:
    """Engines that search together. Use it from one thread at a time.

    Args:
        open_engine: makes one, in its process; must be picklable.
        count: how many.
        threads: of each; None leaves them alone.

    Raises:
        RetrieverError: an engine did.
    """

    def __init__(self, open_engine: Callable[[], Engine], count: int, threads: int | None) -> None:
        self.on_stage: Callable[[str, float], None] | None = None
        self._start = partial(WorkerProcess[Engine], open_engine, threads)
        self.workers = [self._start() for _ in range(count)]
        """The first of them makes the updates."""
        self._may_differ = False
        """Whether they may search different states, because one was started again."""
        self.fingerprint = ""
        try:
            self.refresh()
        except Exception:
            self.close()
            raise

    def search(
        self, queries: Sequence[str], k: int, options: SearchOptions = DEFAULT_OPTIONS
    ) -> list[list[Hit]]:
        check_request(queries, k)
        if self._may_differ:
            self.refresh()
        parts = _divide(queries, len(self.workers))
        found: list[Found] = self._call([partial(_search, part, k, options) for part in parts])
        if self.on_stage is not None:
            for _, stages in found:
                for name, seconds in stages:
                    self.on_stage(name, seconds)
        return [hits for part, _ in found for hits in part]

    def first_search(self) -> None:
        self._call_all(_first_search)

    def add(self, passages: Sequence[Passage]) -> int:
        return self._update(partial(_add, passages))

    def delete(self, ids: Sequence[str]) -> int:
        return self._update(partial(_delete, ids))

    def refresh(self) -> None:
        for _ in range(_REFRESH_ATTEMPTS):
            fingerprints = set(self._call_all(_refresh))
            # They differ if the index was changed just between one's look and another's.
            if len(fingerprints) == 1:
                (self.fingerprint,) = fingerprints
                self._may_differ = False
                return
        raise RetrieverUnavailable("the index changes faster than it can be opened")

    def info(self) -> dict[str, Any]:
        (described,) = self._call([_info])
        return described | {"processes": len(self.workers)}

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.end()

    def _update(self, task: Task[int]) -> int:
        try:
            (count,) = self._call([task])
        finally:
            # Also after a failure: it may have come after the index was changed.
            self.refresh()
        return count

    def _call_all(self, task: Task[T]) -> list[T]:
        return self._call([task for _ in self.workers])

    def _call(self, tasks: Sequence[Task[T]]) -> list[T]:
        """Give each of the first workers its task; all have ended when this returns or raises."""
        results: list[T] = []
        failures: list[Exception] = []
        asked: list[int] = []
        for number, task in enumerate(tasks):
            try:
                self.workers[number].send(task)
                asked.append(number)
            except WorkerDied as error:
                failures.append(self._replace(number, error))
        for number in asked:
            try:
                results.append(self.workers[number].result())
            except WorkerDied as error:
                failures.append(self._replace(number, error))
            # Not before the others have been heard: their answers would be taken for those to the next tasks.
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return results

    def _replace(self, number: int, death: WorkerDied) -> RetrieverUnavailable:
        logger.error(f"search process {number} is started again: {death}")
        self.workers[number].end()
        self.workers[number] = self._start()
        self._may_differ = True
        return RetrieverUnavailable(f"a search process died: {death}")


def _divide(queries: Sequence[str], parts: int) -> list[Sequence[str]]:
    """Into `parts` runs of nearly equal length, none of them empty."""
    borders = [len(queries) * part // parts for part in range(parts + 1)]
    return [queries[a:b] for a, b in pairwise(borders) if a < b]


# ---------------------------------------------------------------- in the processes


def _search(
    queries: Sequence[str], k: int, options: SearchOptions, engine: Engine, on_progress: OnProgress
) -> Found:
    stages: list[tuple[str, float]] = []
    engine.on_stage = lambda name, seconds: stages.append((name, seconds))
    return engine.search(queries, k, options), stages


def _first_search(engine: Engine, on_progress: OnProgress) -> None:
    engine.first_search()


def _add(passages: Sequence[Passage], engine: Engine, on_progress: OnProgress) -> int:
    return engine.add(passages)


def _delete(ids: Sequence[str], engine: Engine, on_progress: OnProgress) -> int:
    return engine.delete(ids)


def _refresh(engine: Engine, on_progress: OnProgress) -> str:
    engine.refresh()
    return engine.fingerprint


def _info(engine: Engine, on_progress: OnProgress) -> dict[str, Any]:
    return engine.info()
