"""A process that encodes, for tests that kill it: `python -m tests.retriever_service.encoding_child CORPUS OUT ...`."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.passages.corpus import Passage
from tests.retriever_service.support import HashEncoder, load_hash_encoder

SHARD_ROWS = 8


class SlowEncoder(HashEncoder):
    """Takes its time, so that a test can step in."""

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        for vectors in super().encode_passages(passages, on_rows):
            time.sleep(0.02)
            yield vectors


def load_slow_encoder(spec: EncoderSpec, device: str) -> SlowEncoder:
    return SlowEncoder(spec)


def die_at(moment: int) -> None:
    """Kill this process before (odd) or behind (even) one of the times when a file gets its name."""
    replace, moments = os.replace, iter(range(1, 1_000))

    def step() -> None:
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_or_die(*args: Any) -> None:
        step()
        replace(*args)
        step()

    os.replace = replace_or_die  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--die-at", type=int)
    arguments = parser.parse_args()
    # A shell gives its background jobs, and what they start, deaf ears for Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.die_at:
        die_at(arguments.die_at)
    encode_corpus(
        [arguments.corpus],
        arguments.out,
        EncoderSpec("hash"),
        workers=arguments.workers,
        shard_rows=SHARD_ROWS,
        load_encoder=load_slow_encoder if arguments.slow else load_hash_encoder,
    )


if __name__ == "__main__":
    main()
