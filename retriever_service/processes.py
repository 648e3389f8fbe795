"""An object in a process of its own, and tasks for it.

Guarantees:
- the object is loaded once; a task that fails leaves it, and the process, as they are;
- the process ends when its parent is gone, however that ended, and leaves Ctrl-C and SIGTERM to it;
- a failure, or the death, of the process is an exception in the parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from retriever_service.errors import RetrieverError

W = TypeVar("W")
_LEAVE_S = 2.0
OnProgress = Callable[[int], None]
"""Called with every number of further things that are done."""


class WorkerDied(RetrieverError):
    """The process has ended before it answered."""


@dataclass(frozen=True, slots=True)
class Progress:
    """So much more is done."""

    number: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a task returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    is_mendable: bool


class WorkerProcess(Generic[W]):
    """One process. Give it one task at a time, and receive until its result has come.

    Args:
        load: makes the object, in the process; must be picklable, and so must tasks and their results.
        threads: of torch, OpenMP and the tokenizer there; None leaves them alone.
    """

    def __init__(self, load: Callable[[], W], threads: int | None) -> None:
        # Not forked: torch and Arrow have threads by now, which a fork would cut off in the middle of anything.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        """To wait on, with others'."""
        self._process: BaseProcess = context.Process(target=_work, args=(theirs, load, threads), daemon=True)
        self._process.start()
        theirs.close()
        # Also when this is collected, and before multiprocessing waits for its children at exit.
        self.end: Callable[[], Any] = weakref.finalize(self, _end, self._process, self.connection)
        """End it, whatever it does."""

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None  # it has been started
        return self._process.pid

    def send(self, task: Callable[[W, OnProgress], Any]) -> None:
        """Let it begin.

        Raises:
            WorkerDied.
        """
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def receive(self) -> Progress | Result:
        """Wait for the next message.

        Raises:
            RetrieverError: the task, or the loading, did.
            RuntimeError: anything else went wrong there; with its traceback.
            WorkerDied.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if isinstance(message, _Failure):
            raise RetrieverError(message.message) if message.is_mendable else RuntimeError(message.message)
        assert isinstance(message, Progress | Result)
        return message

    def result(self) -> Any:
        """Wait for the result, as `receive`."""
        while not isinstance(message := self.receive(), Result):
            pass
        return message.value

    def _died(self) -> WorkerDied:
        self._process.join(timeout=60)
        code = self._process.exitcode
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if -code == signal.SIGKILL:
                how += ", as the kernel does when memory runs out"
        else:
            how = f"ended (exit code {code}); its last words are on standard error"
        return WorkerDied(f"the process {self._process.pid} {how}")


def _end(process: BaseProcess, connection: Connection) -> None:
    connection.close()
    # One that waits for a task ends by this, and cleans up behind itself.
    process.join(timeout=_LEAVE_S)
    process.kill()
    process.join()


def _work(connection: Connection, load: Callable[[], Any], threads: int | None) -> None:
    """The life of a process: an object, then task after task until the parent closes the connection."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # They go to all processes as a rule; the parent knows what is to be finished first, and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if threads is not None:
        # Read when the libraries start their pools: OpenMP's for matrices, Rayon's for the tokenizer.
        os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    worker = None
    while (task := _receive(connection)) is not None:
        try:
            if worker is None:
                worker = load()
            with torch_threads(threads):
                answer: Result | _Failure = Result(
                    task(worker, lambda number: connection.send(Progress(number)))
                )
        except RetrieverError as error:
            answer = _Failure(str(error), is_mendable=True)
        except Exception:
            answer = _Failure(f"a process failed:\n{traceback.format_exc()}", is_mendable=False)
        connection.send(answer)


def _receive(connection: Connection) -> Callable[[Any, OnProgress], Any] | None:
    try:
        task: Callable[[Any, OnProgress], Any] = connection.recv()
    except EOFError:
        return None
    return task


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # not sys.exit: that would end this thread only


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's number of threads meanwhile; None, or without torch, as it is."""
    torch = sys.modules.get("torch")  # not imported for an object that does without it
    if threads is None or torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
