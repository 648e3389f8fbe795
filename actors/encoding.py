"""Encoding a corpus by Ray actors: one encoder each, on a GPU of any node, and the shards of one job in turn.

Guarantees:
- those of `retriever_service.encoding.encode_job`: a job that was cut off goes on behind its last whole shards;
- an actor that dies costs the shard that it had in hand, which another one makes; the job fails when none is left;
- every wait is bounded and says what for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.deaths import DEATHS, in_words
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
from retriever_service.encoding.encoder import Encoder
from retriever_service.errors import RetrieverUnavailable

if TYPE_CHECKING:
    from retriever_service.choices import StoreDtype
    from retriever_service.encoding.encoder import EncoderSpec, LoadEncoder, TextEncoder
    from retriever_service.encoding.vectors import Job, Shard, VectorStore

logger = logging.getLogger(__name__)


@ray.remote
class EncodingActor:
    """An encoder that makes shards; loaded by the first call, whose caller hears of what is wrong with it."""

    def __init__(self, spec: EncoderSpec, device: str, load_encoder: LoadEncoder) -> None:
        self._load = partial(load_encoder, spec, device)
        self._loaded: TextEncoder | None = None

    def identify(self) -> EncoderIdentity:
        return EncoderIdentity.of(self._encoder())

    def encode(self, job: Job, number: int) -> Shard:
        return encode_shard(job, number, self._encoder())

    def _encoder(self) -> TextEncoder:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


def encode_with_actors(
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    spec: EncoderSpec,
    *,
    num_actors: int,
    device: str = "cuda",
    num_cpus: int = 1,
    shard_rows: int = SHARD_ROWS,
    store_dtype: StoreDtype = "float32",
    load_timeout_s: float = 1_800.0,
    shard_timeout_s: float = 3_600.0,
    on_progress: Progress | None = None,
    load_encoder: LoadEncoder = Encoder.load,
) -> VectorStore:
    """As `retriever_service.encoding.encode.encode_corpus`, by actors; the driver reads the corpus.

    Args:
        out_dir: on a path that all nodes see.
        num_actors: each takes a whole GPU, or none if `device` is "cpu".
        num_cpus: cores of each actor.
        load_timeout_s: until the first actor has its encoder, in seconds.
        shard_timeout_s: from one finished shard to the next, of all actors together, in seconds.

    Raises:
        RetrieverError: see `encode_corpus`.
        RetrieverUnavailable: no actor could be had, or all of them died or hang. What was finished is kept.
    """
    options = {"num_cpus": num_cpus, "num_gpus": 1 if device.startswith("cuda") else 0}
    start = EncodingActor.options(**options).remote  # type: ignore[attr-defined]
    actors = [start(spec, device, load_encoder) for _ in range(num_actors)]

    def identify(count: int) -> EncoderIdentity:
        loading = [actor.identify.remote() for actor in actors]
        loaded, _ = ray.wait(loading, timeout=load_timeout_s)
        if not loaded:
            raise RetrieverUnavailable(
                f"no encoding actor was ready within {load_timeout_s} s; does the cluster have {options} free?"
            )
        identity: EncoderIdentity = ray.get(loaded[0])
        return identity

    try:
        with open_job(
            corpus_sources, out_dir, shard_rows=shard_rows, store_dtype=store_dtype, identify=identify
        ) as job:
            pending = pending_shards(job)
            _encode_all(actors, job, pending, counter(job, pending, on_progress), shard_timeout_s)
            return finish_job(job)
    finally:
        for actor in actors:
            ray.kill(actor)


def _encode_all(
    actors: Sequence[Any], job: Job, numbers: Sequence[int], report: Callable[[int], None], timeout_s: float
) -> None:
    idle, waiting = list(actors), deque(numbers)
    busy: dict[Any, tuple[Any, int]] = {}
    failure: Exception | None = None
    while waiting or busy:
        while waiting and idle:
            actor, number = idle.pop(), waiting.popleft()
            busy[actor.encode.remote(job, number)] = actor, number
        if not busy:
            raise RetrieverUnavailable(
                f"all {len(actors)} encoding actors died, {len(waiting)} shards are left; the last failure: {failure!r}"
            ) from failure
        ready, _ = ray.wait(list(busy), timeout=timeout_s)
        if not ready:
            raise RetrieverUnavailable(
                f"none of {len(busy)} encoding actors made a shard within {timeout_s} s"
            )
        actor, number = busy.pop(ready[0])
        try:
            ray.get(ready[0])
        except DEATHS as error:
            logger.warning(f"an encoding actor died; shard {number} goes to another one: {in_words(error)}")
            failure = error
            waiting.appendleft(number)
        else:
            idle.append(actor)
            report(len(job.rows(number)))
