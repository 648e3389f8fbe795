"""Encoding a corpus into a directory of vectors, by the cores of this machine; `actors.encoding` does it by Ray.

Guarantees:
- killed at any moment, the same command goes on behind the last whole shards, and ends with the same bytes as an
  undisturbed run, for any number of workers (`threads_per_worker`, and the kind of device, have a say in the last bits
  of a vector);
- a directory of another corpus, encoder or layout is refused and left alone;
- the whole corpus is read and checked before the encoder is loaded; disk and memory are checked before anything is
  encoded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from retriever_service.choices import StoreDtype
from retriever_service.encoding.encode_job import (
    SHARD_ROWS,
    EncoderIdentity,
    Progress,
    counter,
    encode_shard,
    finish_job,
    open_job,
    pending_shards,
)
from retriever_service.encoding.encode_workers import EncoderHere, EncoderProcesses, Encoders, Task
from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, OnRows, TextEncoder
from retriever_service.encoding.vectors import Contents, Job, VectorStore
from retriever_service.errors import RetrieverError
from retriever_service.machine import available_cores, available_memory
from retriever_service.passages.corpus import Passage

__all__ = ["CPU_THREADS_PER_WORKER", "Progress", "encode_corpus"]

logger = logging.getLogger(__name__)

CPU_THREADS_PER_WORKER = 1
"""Several processes of one thread encode more than one process of several: nothing waits for the slowest thread."""
_PROBE_TOKENS, _LONG_PASSAGE_TOKENS = 16_384, 512
_MIB = 1 << 20

T = TypeVar("T")


def encode_corpus(
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    spec: EncoderSpec,
    *,
    device: str = "cpu",
    workers: int | None = None,
    threads_per_worker: int | None = None,
    shard_rows: int = SHARD_ROWS,
    store_dtype: StoreDtype = "float32",
    memory_bytes: int | None = None,
    on_progress: Progress | None = None,
    load_encoder: LoadEncoder = Encoder.load,
) -> VectorStore:
    """Encode a corpus into `out_dir`, go on with it, or open it if it is complete.

    Args:
        corpus_sources: see `CorpusReader`.
        device: torch device name; several workers share it.
        workers: processes that encode; 1, or a corpus of one shard: this process alone. None: as many as keep all cores
            busy on a CPU, 1 on a GPU.
        threads_per_worker: CPU threads of each. None: `CPU_THREADS_PER_WORKER` on a CPU; on a GPU they are left alone.
        shard_rows: passages per file; a job that is cut off loses at most so many per worker.
        store_dtype: of the stored vectors, "float32" or "float16".
        memory_bytes: most resident memory of all processes together; fewer workers are started where it is short.
            None: what the machine has free, if there are several workers. Reading the corpus is not in it: ids and
            16 bytes per passage, until the last one is read.
        on_progress: called at the start, with what is there already, and as passages are encoded.
        load_encoder: how a spec becomes an encoder. With several workers it must be picklable, and a script that calls
            this needs its `if __name__ == "__main__":`.

    Raises:
        RetrieverError: a mistake in the corpus, encoder or arguments; another job, or other files, in `out_dir`; a
            damaged shard; too little memory or disk space; a worker that was killed.
    """
    if threads_per_worker is None and device == "cpu":
        threads_per_worker = CPU_THREADS_PER_WORKER
    cores = available_cores() if device == "cpu" else 1
    num_workers = max(1, cores // (threads_per_worker or 1)) if workers is None else workers
    if num_workers < 1 or (threads_per_worker is not None and threads_per_worker < 1):
        raise RetrieverError(
            f"workers and threads must be at least 1 each, got {num_workers} and {threads_per_worker}"
        )
    load = partial(load_encoder, spec, device)
    running = ExitStack()
    encoders: Encoders

    def identify(count: int) -> EncoderIdentity:
        nonlocal encoders, num_workers, memory_bytes
        shards = -(-count // shard_rows)
        if num_workers == 1 or shards == 1:
            # The cores that further workers would have had are this one's.
            encoders = EncoderHere(load, threads_per_worker and threads_per_worker * num_workers)
            num_workers = 1
        else:
            num_workers = min(num_workers, shards)
            encoders = EncoderProcesses(load, threads_per_worker)
            if memory_bytes is None:
                memory_bytes = available_memory() + _resident_bytes("VmRSS")
        running.callback(encoders.close)
        return _ask(encoders, _identify)

    job_opened = open_job(
        corpus_sources, out_dir, shard_rows=shard_rows, store_dtype=store_dtype, identify=identify
    )
    # Twice: no worker may be about once others can open the job, nor where it could not be opened.
    with running, job_opened as job, running:
        pending = pending_shards(job)
        if pending and memory_bytes is not None:
            num_workers = _workers_that_fit(job, encoders, num_workers, memory_bytes)
        tasks = [partial(encode_shard, job, number) for number in pending]
        for shard in encoders.run(tasks, num_workers, counter(job, pending, on_progress)):
            logger.debug(f"{shard.name}: {shard.rows} passages from row {shard.first_row} on")
        return finish_job(job)


def _ask(encoders: Encoders, task: Task[T]) -> T:
    """The result of one task."""
    (result,) = encoders.run([task], 1, lambda rows: None)
    return result


def _identify(encoder: TextEncoder, on_rows: OnRows) -> EncoderIdentity:
    return EncoderIdentity.of(encoder)


def _workers_that_fit(job: Job, encoders: Encoders, wanted: int, memory_bytes: int) -> int:
    """How many of the workers stay within the bound, from what one of them, and this process, are measured to need."""
    each = _ask(encoders, partial(_memory_needed, job.contents))
    this = _resident_bytes("VmRSS") if wanted > 1 else 0  # alone, this process is the worker
    if this + each > memory_bytes:
        # Rounded up: what is resident differs by a few per cent from run to run.
        least = math.ceil((this + each) * 1.05 / _MIB)
        raise RetrieverError(
            f"a memory bound of {memory_bytes // _MIB:,} MiB is too small to encode with {job.contents.encoder.model}: "
            f"one worker needs {least:,} MiB"
        )
    workers = min(wanted, (memory_bytes - this) // each)
    if workers < wanted:
        logger.info(f"{workers} of {wanted} workers: each needs {each // _MIB:,} MiB")
    return workers


def _memory_needed(contents: Contents, encoder: TextEncoder, on_rows: OnRows) -> int:
    """Most resident bytes of this process while it encodes, tried out with the longest passages."""
    tokens = encoder.spec.max_length or _LONG_PASSAGE_TOKENS
    longest = Passage("", "", "word " * tokens)
    for _ in encoder.encode_passages([longest] * max(1, _PROBE_TOKENS // tokens)):
        pass
    # Of a shard: its vectors as stored and as encoded, its passages on mapped pages, as strings and with prefixes.
    text_bytes = contents.passages.bytes // contents.count
    row_bytes = contents.row_bytes + 4 * contents.dimension + 3 * text_bytes
    return _resident_bytes("VmHWM") + min(contents.shard_rows, contents.count) * row_bytes


def _resident_bytes(key: Literal["VmRSS", "VmHWM"]) -> int:
    """Resident memory of this process: now, or at most so far.

    From /proc, because getrusage counts what the parent held when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
