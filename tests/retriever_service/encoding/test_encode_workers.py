"""Encoding by several processes: what dies, runs out of memory or of disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.encoding.vectors import VectorStore
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from tests.retriever_service.encoding.encoding_support import COUNT, child, encode, files, write_corpus
from tests.retriever_service.encoding_child import SHARD_ROWS
from tests.retriever_service.support import HashEncoder, write_jsonl


class Fatal(HashEncoder):
    """Brings its process down at one of the passages."""

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        for passage in passages:
            if passage.id == "p12":
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().encode_passages([passage], on_rows)


class Faulty(HashEncoder):
    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        raise KeyError("a bug of ours")


def load_fatal(spec: EncoderSpec, device: str) -> Fatal:
    return Fatal(spec)


def load_faulty(spec: EncoderSpec, device: str) -> Faulty:
    return Faulty(spec)


def load_and_tell(register: Path, spec: EncoderSpec, device: str) -> HashEncoder:
    (register / str(os.getpid())).touch()
    return HashEncoder(spec)


def test_killed_worker_is_a_clear_error_and_costs_its_shard_only(
    corpus: Path, out: Path, undisturbed: dict[str, bytes]
) -> None:
    with pytest.raises(
        RetrieverError, match=r"signal 9 \(SIGKILL\).*memory runs out.*run the same command again"
    ):
        encode(corpus, out, workers=2, load_encoder=load_fatal)
    encode(corpus, out, workers=2)
    assert files(out) == undisturbed


def test_bug_in_a_worker_comes_with_its_traceback(corpus: Path, out: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a bug of ours"):
        encode(corpus, out, workers=2, load_encoder=load_faulty)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(3_000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited in vain until {what}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, out: Path, number: signal.Signals) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", count=400)
    parent = subprocess.Popen(
        child(corpus, out, "--workers", 2, "--slow"), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until(lambda: (out / "shards" / "00003.json").exists(), "both workers encode")
        workers = descendants(parent)
        assert len(workers) >= 2
        if number == signal.SIGKILL:
            parent.kill()
        else:
            os.killpg(parent.pid, signal.SIGINT)  # as Ctrl-C does, to all of them
        parent.wait(timeout=500)
        wait_until(lambda: not any(map(is_running, workers)), "the workers are gone")
    finally:
        parent.kill()
        parent.wait()
    assert not (out / "manifest.json").exists()
    encode(corpus, out)
    encode(corpus, tmp_path / "undisturbed")
    assert files(out) == files(tmp_path / "undisturbed")


# Memory and disk


def test_bound_below_one_worker_is_refused_with_the_smallest_that_works(corpus: Path, out: Path) -> None:
    with pytest.raises(
        RetrieverError, match=r"bound of 9 MiB is too small.*one worker needs ([\d,]+) MiB"
    ) as refusal:
        encode(corpus, out, memory_bytes=9 << 20)
    assert not list((out / "shards").iterdir())
    found = re.search(r"needs ([\d,]+) MiB", str(refusal.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    assert len(encode(corpus, out, memory_bytes=least << 20)) == COUNT


def test_short_memory_means_fewer_workers(
    corpus: Path, out: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What this process holds depends on the tests before; beside much of it a second worker would be a rounding error.
    monkeypatch.setattr("retriever_service.encoding.encode._resident_bytes", lambda key: 64 << 20)
    register = tmp_path / "pids"
    register.mkdir()
    with pytest.raises(RetrieverError) as refusal:
        encode(corpus, out, workers=3, memory_bytes=9 << 20)
    found = re.search(r"needs ([\d,]+) MiB", str(refusal.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    load = partial(load_and_tell, register)
    encode(corpus, out, workers=3, memory_bytes=least << 20, load_encoder=load)
    assert len(list(register.iterdir())) == 1
    assert files(out) == undisturbed


@pytest.mark.parametrize(
    ("free", "what"),
    [(10, "a copy of the passages"), (2_000, "encoding 21 passages needs about 2,688 bytes")],
)
def test_full_disk_is_noticed_before_anything_is_encoded(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch, free: int, what: str
) -> None:
    monkeypatch.setattr("retriever_service.files.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(RetrieverError, match=what):
        encode(corpus, out, load_encoder=lambda spec, device: Faulty(spec))
    assert not out.exists()


@pytest.mark.parametrize("call", range(1, 19, 3))
def test_disk_that_fills_up_leaves_what_was_finished(
    corpus: Path, out: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls = iter(range(1, 1_000))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RetrieverError, match="the disk is full; make room and run the same command again"
        ):
            encode(corpus, out)
    left = files(out) if out.exists() else {}
    assert left == {name: undisturbed[name] for name in left}
    encode(corpus, out)
    assert files(out) == undisturbed


def test_really_full_disk_leaves_what_was_finished(
    corpus: Path, small_disk: Path, undisturbed: dict[str, bytes]
) -> None:
    out, filler = small_disk / "vectors", small_disk / "filler"

    def fill(done: int, total: int) -> None:
        if done == SHARD_ROWS + 1:
            with open(filler, "wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4_096)):
                    pass
            assert shutil.disk_usage(small_disk).free == 0

    with pytest.raises(RetrieverError, match=r"00001\.npy: the disk is full"):
        encode(corpus, out, on_progress=fill)
    assert sorted(files(out)) == ["job.json", "passages.arrow", "shards/00000.json", "shards/00000.npy"]
    filler.unlink()
    encode(corpus, out)
    assert files(out) == undisturbed


# With the real encoder


@pytest.mark.component
def test_model_gives_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    rows = ({"id": str(i), "title": f"Lion {i}", "text": "the lion lives " * (1 + i % 40)} for i in range(90))
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    for workers in (1, 2):
        encode_corpus([corpus], tmp_path / str(workers), EncoderSpec(), workers=workers, shard_rows=32)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    manifest = VectorStore.open(tmp_path / "2").manifest
    assert (manifest.pooling, manifest.encoder.normalise) == ("mean", True)
    assert manifest.encoder.dtype in ("float32", "bfloat16")
