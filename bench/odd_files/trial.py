"""One odd file, read: what comes of it."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.odd_files.damages import DAMAGES, Damage
from bench.odd_files.readers import Reader
from pipeline.core.errors import RunError, UserError
from pipeline.core.mirror.store import StoreError
from pipeline.core.plan.shape import UnknownShape
from retriever_service.errors import RetrieverError

MENDABLE = (UserError, RetrieverError, RunError, StoreError, UnknownShape)
LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """`records` were read, or there was one error in words; `silent` is neither, `crashed` anything else."""

    reader: str
    file: str
    damage: str
    kind: Literal["records", "error", "silent", "crashed"]
    records: int = 0
    text: str = ""

    @property
    def is_right(self) -> bool:
        return self.kind in ("records", "error")


def trials(reader: Reader) -> Iterator[Outcome]:
    """Every damage to every file of a reader; also no file at all, and a folder in its place."""
    with tempfile.TemporaryDirectory() as whole:
        reader.make(Path(whole))
        for file in reader.files:
            for name, damage in DAMAGES.items():
                yield trial(reader, Path(whole), file, name, _rewriting(damage))
            yield trial(reader, Path(whole), file, "not there", Path.unlink)
            yield trial(reader, Path(whole), file, "a folder", _folder)


def trial(reader: Reader, whole: Path, file: str, name: str, spoil: Callable[[Path], Any]) -> Outcome:
    """What becomes of a copy of the folder with one file spoilt."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "copy")
        shutil.copytree(whole, folder)
        spoil(folder / file)
        apart = _in_a_child if reader.is_native else _here
        kind, records, text = apart(lambda: _read(reader, folder))
    return Outcome(reader.name, file, name, kind, records, text)


def _here(work: Callable[[], Any]) -> Any:
    return work()


def _read(reader: Reader, folder: Path) -> Any:
    try:
        records = reader.read(folder)
    except MENDABLE as error:
        return "error", 0, str(error)
    except Exception:  # whatever else it is, it is what is looked for
        return "crashed", 0, traceback.format_exc()
    return ("records" if records or reader.may_be_empty else "silent"), records, ""


def _in_a_child(work: Callable[[], Any]) -> Any:
    """Native code that a file has crashed takes its own process along, and no other."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        signal.alarm(LIMIT_S)
        os.close(reading)
        with open(writing, "wb") as answer:
            answer.write(pickle.dumps(work()))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        told = answer.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(told) if told else ("crashed", 0, f"the process ended with status {status}")


def _rewriting(damage: Damage) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(damage(path.read_bytes()))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
