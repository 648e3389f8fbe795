"""Where encoders work: in this process, or each in a process of its own.

Guarantees of the processes:
- each loads its encoder once, and ends when its parent is gone, however that ended;
- a failure, or the death, of one is an exception in the parent, and no process outlives `close`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from retriever_service.encoder import TextEncoder
from retriever_service.errors import RetrieverError

T = TypeVar("T")
OnRows = Callable[[int], None]
"""Called with every number of further passages that are encoded."""
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
            with _torch_threads(self._threads):
                result = task(self._encoder, on_rows)
            yield result

    def close(self) -> None:
        self._encoder = None


class EncoderProcesses:
    """Encoders in processes, started as they are needed.

    Args:
        load: makes one, in its process; must be picklable, and so must tasks and their results.
        threads: of each process; None leaves them alone.
    """

    def __init__(self, load: LoadIt, threads: int | None) -> None:
        self._load = load
        self._threads = threads
        self._idle: list[_Process] = []
        self._all: list[_Process] = []

    def run(self, tasks: Iterable[Task[T]], num_workers: int, on_rows: OnRows) -> Iterator[T]:
        waiting = deque(tasks)
        busy: dict[Any, _Process] = {}
        while waiting or busy:
            while waiting and len(busy) < num_workers:
                worker = self._idle.pop() if self._idle else self._start()
                worker.connection.send(waiting.popleft())
                busy[worker.connection] = worker
            for connection in multiprocessing.connection.wait(list(busy)):
                match busy[connection].receive():
                    case _Rows(number):
                        on_rows(number)
                    case _Result(value):
                        self._idle.append(busy.pop(connection))
                        yield value

    def close(self) -> None:
        for worker in self._all:
            # Nothing is lost by this: what they write is whole or absent.
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._all, self._idle = [], []

    def _start(self) -> _Process:
        # Not forked: torch and Arrow have threads by now, which a fork would cut off in the middle of anything.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._load, self._threads), daemon=True)
        process.start()
        theirs.close()
        worker = _Process(process, ours)
        self._all.append(worker)
        return worker


@dataclass(frozen=True, slots=True)
class _Rows:
    number: int


@dataclass(frozen=True, slots=True)
class _Result:
    value: Any


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    is_mendable: bool


@dataclass(frozen=True, slots=True)
class _Process:
    process: BaseProcess
    connection: Connection

    def receive(self) -> _Rows | _Result:
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join(timeout=60)
            raise RetrieverError(_obituary(self.process)) from error
        if isinstance(message, _Failure):
            raise RetrieverError(message.message) if message.is_mendable else RuntimeError(message.message)
        assert isinstance(message, _Rows | _Result)
        return message


def _obituary(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        if -code == signal.SIGKILL:
            how += ", as the kernel does when memory runs out"
    else:
        how = f"ended (exit code {code}); its last words are on standard error"
    return (
        f"the encoding process {process.pid} {how}. What it finished is kept: run the same command again, with fewer "
        "workers or a memory bound if memory was short"
    )


def _work(connection: Connection, load: LoadIt, threads: int | None) -> None:
    """The life of a process: an encoder, then task after task until the parent closes the connection."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    if threads is not None:
        # Read when the libraries start their pools: OpenMP's for matrices, Rayon's for the tokenizer.
        os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    try:
        encoder = load()
        with _torch_threads(threads):
            while (task := _receive(connection)) is not None:
                result = task(encoder, lambda rows: connection.send(_Rows(rows)))
                connection.send(_Result(result))
    except RetrieverError as error:
        connection.send(_Failure(str(error), is_mendable=True))
    except Exception:
        connection.send(_Failure(f"an encoding process failed:\n{traceback.format_exc()}", is_mendable=False))


def _receive(connection: Connection) -> Task[Any] | None:
    try:
        task: Task[Any] = connection.recv()
    except EOFError:
        return None
    return task


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # not sys.exit: that would end this thread only


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    torch = sys.modules.get("torch")  # not imported for an encoder that does without it
    if threads is None or torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
