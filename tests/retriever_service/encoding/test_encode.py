"""Encoding that is killed, refused or short of something; a hashing encoder in place of a model where it can be."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.encoding.encode_job import (
    EncoderIdentity,
    encode_shard,
    finish_job,
    open_job,
    pending_shards,
)
from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.encoding.vectors import Job
from retriever_service.errors import RetrieverError
from retriever_service.files import exclusive
from retriever_service.passages.corpus import Passage
from tests.retriever_service.encoding.encoding_support import COUNT, SPEC, child, encode, files, write_corpus
from tests.retriever_service.encoding_child import SHARD_ROWS
from tests.retriever_service.support import HashEncoder


class Stopped(Exception):
    """What cuts off a job in this process."""


class Recording(HashEncoder):
    """Knows whose vectors were asked for."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        self.encoded: list[str] = []

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        for passage in passages:
            self.encoded.append(passage.id)
            yield from super().encode_passages([passage], on_rows)


def load_nothing(spec: EncoderSpec, device: str) -> HashEncoder:
    raise RetrieverError("there is no such encoder")


def opened(corpus: Path, out: Path, encoder: HashEncoder) -> AbstractContextManager[Job]:
    return open_job(
        [corpus],
        out,
        shard_rows=SHARD_ROWS,
        store_dtype="float32",
        identify=lambda count: EncoderIdentity.of(encoder),
    )


def cut_off(corpus: Path, out: Path, after: int = SHARD_ROWS) -> None:
    """A job whose first `after` passages were encoded, and one more."""

    def stop(done: int, total: int) -> None:
        if done > after:
            raise Stopped

    with pytest.raises(Stopped):
        encode(corpus, out, on_progress=stop)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)


def killed(corpus: Path, out: Path, moment: int) -> None:
    ended = subprocess.run(child(corpus, out, "--die-at", moment), capture_output=True, timeout=500)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


# Twice per file that gets its name: passages, job, then vectors and record of three shards, then the manifest.
@pytest.mark.parametrize(
    ("moment", "whole", "leftovers"),
    [
        (1, [], 1),
        (2, ["passages.arrow"], 0),
        (4, ["job.json", "passages.arrow"], 0),
        (5, ["job.json", "passages.arrow"], 1),
        (6, ["job.json", "passages.arrow", "shards/00000.npy"], 0),
        (8, ["job.json", "passages.arrow", "shards/00000.json", "shards/00000.npy"], 0),
        (17, None, 1),
        (18, None, 0),
    ],
)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(
    corpus: Path,
    out: Path,
    undisturbed: dict[str, bytes],
    moment: int,
    whole: list[str] | None,
    leftovers: int,
) -> None:
    killed(corpus, out, moment)
    left = files(out)
    assert sum(name.endswith(".tmp") for name in left) == leftovers
    if whole is not None:
        assert [name for name in left if not name.endswith(".tmp")] == whole
    encode(corpus, out)
    assert files(out) == undisturbed


def test_killed_again_and_again_it_goes_on_behind_the_last_whole_shard(
    corpus: Path, out: Path, undisturbed: dict[str, bytes]
) -> None:
    """Defect 7 of reference builders: every run begins anew and overwrites what there is."""
    for finished in (1, 2):
        # Of the run that begins: passages and job, then one shard. Of the next: one shard, and half of another.
        killed(corpus, out, 10 if finished == 1 else 6)
        assert len(list((out / "shards").glob("*.json"))) == finished
        assert len(list((out / "shards").glob("*.npy"))) == finished + 1
    encoder = Recording(SPEC)
    encode(corpus, out, load_encoder=lambda spec, device: encoder)
    assert encoder.encoded == [f"p{i}" for i in range(2 * SHARD_ROWS, COUNT)]
    assert files(out) == undisturbed


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    corpus: Path, out: Path, undisturbed: dict[str, bytes], workers: int
) -> None:
    encode(corpus, out, workers=workers)
    assert files(out) == undisturbed


def test_passages_are_read_when_they_are_encoded(tmp_path: Path, out: Path) -> None:
    """Defect 7 of reference builders: all texts, and all vectors, are held at once."""
    alive: list[int] = []

    class Counting(HashEncoder):
        def encode_passages(
            self, passages: Iterable[Passage], on_rows: OnRows | None = None
        ) -> Iterator[Vectors]:
            for number, vectors in enumerate(super().encode_passages(passages, on_rows)):
                if number == SHARD_ROWS // 2:
                    alive.append(num_passages_alive())
                yield vectors

    before = num_passages_alive()
    corpus = write_corpus(tmp_path / "c.jsonl", 3 * SHARD_ROWS)
    encode(corpus, out, load_encoder=lambda spec, device: Counting(spec))
    assert len(alive) == 3
    assert max(alive) - before <= 2


def num_passages_alive() -> int:
    return sum(isinstance(it, Passage) for it in gc.get_objects())


def test_shards_can_be_made_in_any_order(corpus: Path, out: Path, undisturbed: dict[str, bytes]) -> None:
    encoder = HashEncoder(SPEC)
    with opened(corpus, out, encoder) as job:
        assert pending_shards(job) == [0, 1, 2]
        for number in (2, 0):
            encode_shard(job, number, encoder)
        assert pending_shards(job) == [1]
        with pytest.raises(RuntimeError, match="shard 1 is not finished"):
            finish_job(job)
        encode_shard(job, 1, encoder)
        finish_job(job)
    assert files(out) == undisturbed


def test_corpus_of_one_shard_is_encoded_in_this_process(corpus: Path, out: Path) -> None:
    cannot_be_sent = lambda spec, device: HashEncoder(spec)  # noqa: E731
    assert len(encode(corpus, out, workers=4, shard_rows=COUNT, load_encoder=cannot_be_sent)) == COUNT


def test_progress_begins_with_what_is_there_and_ends_with_all(corpus: Path, out: Path) -> None:
    cut_off(corpus, out)
    progress: list[tuple[int, int]] = []
    encode(corpus, out, on_progress=lambda *done: progress.append(done))
    assert progress[0] == (SHARD_ROWS, COUNT)
    assert progress[-1] == (COUNT, COUNT)
    assert progress == sorted(progress)


def test_progress_comes_from_workers_too(corpus: Path, out: Path) -> None:
    progress: list[tuple[int, int]] = []
    encode(corpus, out, workers=2, on_progress=lambda *done: progress.append(done))
    assert progress == [(done, COUNT) for done in range(COUNT + 1)]


def test_complete_store_is_opened_and_nothing_encoded(corpus: Path, out: Path) -> None:
    encode(corpus, out)
    before = files(out)
    encoder = Recording(SPEC)
    assert len(encode(corpus, out, load_encoder=lambda spec, device: encoder)) == COUNT
    assert encoder.encoded == []
    assert files(out) == before


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": EncoderSpec("other")}, "encoder model 'hash' -> 'other'"),
        ({"spec": EncoderSpec("hash", passage_prefix="p: ")}, "encoder passage_prefix None -> 'p: '"),
        ({"store_dtype": "float16"}, "dtype float32 -> float16"),
        ({"shard_rows": 9}, "shard_rows 8 -> 9"),
        ({"corpus": 20}, r"corpus \(21 passages, checksum \w{12}\) -> \(20 passages, checksum \w{12}\)"),
    ],
)
def test_other_job_is_refused_with_the_difference_and_left_alone(
    tmp_path: Path, out: Path, change: dict[str, Any], message: str, is_complete: bool
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    if is_complete:
        encode(corpus, out)
    else:
        cut_off(corpus, out)
    before = files(out)
    options = dict(change)
    if count := options.pop("corpus", None):
        write_corpus(corpus, count)
    with pytest.raises(RetrieverError, match=f"differs in {message}"):
        encode(corpus, out, **options)
    assert files(out) == before


def test_moved_copy_of_the_encoder_is_the_same_encoder(corpus: Path, out: Path) -> None:
    cut_off(corpus, out)
    moved = HashEncoder(SPEC)
    moved.spec = EncoderSpec("elsewhere/hash", query_prefix="")
    assert encode(corpus, out, load_encoder=lambda spec, device: moved).manifest.encoder.model == "hash"


@pytest.mark.parametrize("spoil", [damage, lambda path: os.truncate(path, 100)], ids=["flipped", "cut"])
def test_damaged_shard_stops_the_job_and_is_made_anew_once_it_is_removed(
    corpus: Path, out: Path, undisturbed: dict[str, bytes], spoil: Callable[[Path], None]
) -> None:
    cut_off(corpus, out, after=2 * SHARD_ROWS)
    shard = out / "shards" / "00000.npy"
    spoil(shard)
    before = files(out)
    with pytest.raises(RetrieverError, match=r"00000\.npy (was changed|has 100 bytes).*remove it"):
        encode(corpus, out)
    assert files(out) == before
    shard.unlink()
    encoder = Recording(SPEC)
    encode(corpus, out, load_encoder=lambda spec, device: encoder)
    assert encoder.encoded == [f"p{i}" for i in range(COUNT) if not SHARD_ROWS <= i < 2 * SHARD_ROWS]
    assert files(out) == undisturbed


@pytest.mark.parametrize("name", ["passages.arrow", "shards/00001.npy", "manifest.json"])
def test_damage_to_a_complete_store_is_mended_as_the_message_says(
    corpus: Path, out: Path, undisturbed: dict[str, bytes], name: str
) -> None:
    encode(corpus, out)
    os.truncate(out / name, 100)
    with pytest.raises(RetrieverError, match=rf"{name} .*remove it \(and manifest\.json"):
        encode(corpus, out)
    (out / name).unlink()
    (out / "manifest.json").unlink(missing_ok=True)
    encode(corpus, out)
    assert files(out) == undisturbed


def test_record_of_another_shard_is_noticed(corpus: Path, out: Path) -> None:
    cut_off(corpus, out, after=2 * SHARD_ROWS)
    (out / "shards" / "00001.json").write_bytes((out / "shards" / "00000.json").read_bytes())
    with pytest.raises(RetrieverError, match=r"00001\.json is of another shard"):
        encode(corpus, out)


def test_shards_without_their_job_are_not_taken_up(corpus: Path, out: Path) -> None:
    cut_off(corpus, out)
    (out / "job.json").unlink()
    with pytest.raises(RetrieverError, match="not a directory of vectors"):
        encode(corpus, out)


def test_directory_with_other_files_is_not_written_to(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(RetrieverError, match="exists and is not a directory of vectors"):
        encode(corpus, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_corpus_is_refused_before_the_encoder_is_loaded_and_leaves_nothing(
    tmp_path: Path, out: Path
) -> None:
    bad = tmp_path / "c.jsonl"
    bad.write_text('{"id": "1", "text": "x"}\n{"id": "2"}\n')
    with pytest.raises(RetrieverError, match=r"c\.jsonl:2"):
        encode(bad, out, load_encoder=load_nothing)
    assert not out.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_encoder_that_cannot_be_loaded_is_the_users_mistake(corpus: Path, out: Path, workers: int) -> None:
    with pytest.raises(RetrieverError, match="there is no such encoder"):
        encode(corpus, out, workers=workers, load_encoder=load_nothing)
    assert not out.exists()


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"threads_per_worker": 0}, {"shard_rows": 0}, {"store_dtype": "int8"}]
)
def test_senseless_arguments_are_refused(corpus: Path, out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RetrieverError, match=r"at least 1|float32 or float16"):
        encode(corpus, out, **options)
    assert not out.exists()


def test_second_process_is_refused_while_the_first_works(corpus: Path, out: Path) -> None:
    cut_off(corpus, out)
    with exclusive(out / "lock"), pytest.raises(RetrieverError, match="another process is working"):
        encode(corpus, out)
    assert len(encode(corpus, out)) == COUNT


def test_encoder_of_another_kind_makes_no_shard(corpus: Path, out: Path) -> None:
    with (
        opened(corpus, out, HashEncoder(SPEC)) as job,
        pytest.raises(RetrieverError, match="is encoded with 'hash', not 'other'"),
    ):
        encode_shard(job, 0, HashEncoder(EncoderSpec("other")))


def test_encoder_that_gives_too_few_vectors_is_noticed(corpus: Path, out: Path) -> None:
    class Short(HashEncoder):
        def encode_passages(
            self, passages: Iterable[Passage], on_rows: OnRows | None = None
        ) -> Iterator[Vectors]:
            yield from list(super().encode_passages(passages, on_rows))[1:]

    with pytest.raises(RuntimeError, match="7 vectors for 8 passages"):
        encode(corpus, out, load_encoder=lambda spec, device: Short(spec))


def test_vectors_too_long_for_half_precision_are_refused(corpus: Path, out: Path) -> None:
    class Long(HashEncoder):
        def _vector(self, text: str) -> Vectors:
            return super()._vector(text) * np.float32(1e6)

    with pytest.raises(RetrieverError, match="do not fit float16; use float32"):
        encode(corpus, out, store_dtype="float16", load_encoder=lambda spec, device: Long(spec))


# Processes
