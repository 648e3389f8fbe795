"""Where encoders work: in this process, or each in a process of its own."""

from __future__ import annotations

import multiprocessing.connection
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from retriever_service.encoding.encoder import OnRows, TextEncoder
from retriever_service.errors import RetrieverError
from retriever_service.processes import Progress, Result, WorkerDied, WorkerProcess, torch_threads

T = TypeVar("T")
Task = Callable[[TextEncoder, OnRows], T]
LoadIt = Callable[[], TextEncoder]


class Encoders(Protocol):
    """One or more encoders that work on tasks."""

    def run(self, tasks: Iterable[Task[T]], num_workers: int, on_rows: OnRows) -> Iterator[T]:
        """The results of all tasks, in the order in which they are ready; at most `num_workers` at the same time.

        Raises:
            RetrieverError: a task, or the loading of an encoder, did; or a process was killed.
            RuntimeError: anything else that went wrong in a process, with its traceback.
        """
        ...

    def close(self) -> None:
        """End all work, finished or not."""
        ...


class EncoderHere:
    """One encoder in this process.

    Args:
        load: makes it, when it is first needed.
        threads: of torch, while it works; None leaves them alone.
    """

    def __init__(self, load: LoadIt, threads: int | None) -> None:
        self._load = load
        self._threads = threads
        self._encoder: TextEncoder | None = None

    def run(self, tasks: Iterable[Task[T]], num_workers: int, on_rows: OnRows) -> Iterator[T]:
        if self._encoder is None:
            self._encoder = self._load()
        for task in tasks:
            with torch_threads(self._threads):
                result = task(self._encoder, on_rows)
            yield result

    def close(self) -> None:
        self._encoder = None


class EncoderProcesses:
    """Encoders in processes, started as they are needed.

    Args:
        load, threads: see `WorkerProcess`.
    """

    def __init__(self, load: LoadIt, threads: int | None) -> None:
        self._load = load
        self._threads = threads
        self._idle: list[WorkerProcess[TextEncoder]] = []
        self._all: list[WorkerProcess[TextEncoder]] = []

    def run(self, tasks: Iterable[Task[T]], num_workers: int, on_rows: OnRows) -> Iterator[T]:
        try:
            yield from self._run(deque(tasks), num_workers, on_rows)
        except WorkerDied as error:
            raise RetrieverError(
                f"encoding failed: {error}. What was finished is kept: run the same command again, with fewer workers "
                "or a memory bound if memory was short"
            ) from error

    def _run(self, waiting: deque[Task[T]], num_workers: int, on_rows: OnRows) -> Iterator[T]:
        busy: dict[Any, WorkerProcess[TextEncoder]] = {}
        while waiting or busy:
            while waiting and len(busy) < num_workers:
                worker = self._idle.pop() if self._idle else self._start()
                worker.send(waiting.popleft())
                busy[worker.connection] = worker
            for connection in multiprocessing.connection.wait(list(busy)):
                match busy[connection].receive():
                    case Progress(number):
                        on_rows(number)
                    case Result(value):
                        self._idle.append(busy.pop(connection))
                        yield value

    def close(self) -> None:
        for worker in self._all:
            # Nothing is lost by this: what they write is whole or absent.
            worker.end()
        self._all, self._idle = [], []

    def _start(self) -> WorkerProcess[TextEncoder]:
        worker = WorkerProcess(self._load, self._threads)
        self._all.append(worker)
        return worker
