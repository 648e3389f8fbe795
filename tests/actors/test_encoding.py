"""Encoding by actors: who gets which shard when others die or hang, without Ray where it can be; one job with Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
from typer.testing import CliRunner

from actors.encoding import _encode_all, encode_with_actors
from pipeline.cli import app
from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.encoding.vectors import VectorStore
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl

SPEC = EncoderSpec("hash")
COUNT, SHARD_ROWS = 40, 8


@dataclass(frozen=True, eq=False)
class FakeReference:
    outcome: Exception | str | None


class FakeActor:
    """Its shards end as `script` says: an exception, "hang", or None for done, which all later ones are."""

    def __init__(self, *script: Exception | str | None) -> None:
        self.made: list[int] = []
        self._script = list(script)
        self.encode = SimpleNamespace(remote=self._encode)

    def _encode(self, job: Any, number: int) -> Any:
        outcome = self._script.pop(0) if self._script else None
        if outcome is None:
            self.made.append(number)
        return FakeReference(outcome)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [reference for reference in references if reference.outcome != "hang"]
        return ready[:1], ready[1:]

    def get(reference: Any) -> None:
        if reference.outcome is not None:
            raise reference.outcome

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)


DEAD = ray.exceptions.ActorDiedError()
JOB: Any = SimpleNamespace(rows=lambda number: range(SHARD_ROWS))


def encode_all(*actors: FakeActor, numbers: Iterable[int] = range(6)) -> list[int]:
    reported: list[int] = []
    _encode_all(actors, JOB, list(numbers), reported.append, timeout_s=1)
    return reported


def test_every_shard_is_made_once(no_ray: None) -> None:
    actors = [FakeActor() for _ in range(3)]
    assert encode_all(*actors) == [SHARD_ROWS] * 6
    assert sorted(number for actor in actors for number in actor.made) == list(range(6))


def test_shard_of_a_dead_actor_goes_to_another_one(no_ray: None) -> None:
    dead, alive = FakeActor(DEAD), FakeActor()
    assert encode_all(dead, alive) == [SHARD_ROWS] * 6
    assert (dead.made, sorted(alive.made)) == ([], list(range(6)))


def test_job_fails_when_no_actor_is_left(no_ray: None) -> None:
    with pytest.raises(
        RetrieverUnavailable, match=r"all 1 encoding actors died, 5 shards are left.*ActorDiedError"
    ):
        encode_all(FakeActor(None, DEAD))


def test_hanging_actors_are_given_up(no_ray: None) -> None:
    with pytest.raises(RetrieverUnavailable, match="none of 2 encoding actors made a shard within 1 s"):
        encode_all(FakeActor("hang"), FakeActor("hang"))


def test_mistake_of_the_user_is_not_tried_again(no_ray: None) -> None:
    with pytest.raises(RetrieverError, match="the disk is full"):
        encode_all(FakeActor(RetrieverError("the disk is full")), FakeActor())


class Mortal(HashEncoder):
    """Brings its process down at one of the passages, the first time that anybody is there."""

    def __init__(self, spec: EncoderSpec, grave: Path) -> None:
        super().__init__(spec)
        self._grave = grave

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        for passage in passages:
            if passage.id == "p20" and not self._grave.exists():
                self._grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().encode_passages([passage], on_rows)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.component
def test_actors_make_the_bytes_that_processes_make_and_survive_the_loss_of_one(
    local_ray: None, tmp_path: Path
) -> None:
    rows = ({"id": f"p{i}", "text": f"word{i} of {i % 5}"} for i in range(COUNT))
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    progress: list[tuple[int, int]] = []
    by_actors = encode_with_actors(
        [corpus],
        tmp_path / "by-actors",
        SPEC,
        num_actors=2,
        device="cpu",
        shard_rows=SHARD_ROWS,
        on_progress=lambda *done: progress.append(done),
        load_encoder=lambda spec, device: Mortal(spec, tmp_path / "grave"),
    )
    here = encode_corpus(
        [corpus], tmp_path / "here", SPEC, workers=1, shard_rows=SHARD_ROWS, load_encoder=load_hash_encoder
    )
    assert (tmp_path / "grave").exists()
    assert (progress[0], progress[-1]) == ((0, COUNT), (COUNT, COUNT))
    assert by_actors.manifest == here.manifest
    by_actors.verify()

    def refuse(spec: EncoderSpec, device: str) -> HashEncoder:
        raise RetrieverError("there is no such encoder")

    with pytest.raises(RetrieverError, match="there is no such encoder"):
        encode_with_actors(
            [corpus], tmp_path / "never", SPEC, num_actors=1, device="cpu", load_encoder=refuse
        )
    assert not (tmp_path / "never").exists()
    with pytest.raises(
        RetrieverUnavailable, match=r"no encoding actor was ready within 1\.0 s; .*'num_gpus': 1"
    ):
        encode_with_actors(
            [corpus], tmp_path / "never", SPEC, num_actors=1, device="cuda", load_timeout_s=1.0
        )


@pytest.mark.component
def test_the_command_encodes_with_the_cores_of_a_cluster_that_has_no_gpus(
    local_ray: None, tmp_path: Path
) -> None:
    rows = ({"id": f"p{i}", "text": f"word{i} of {i % 5}"} for i in range(COUNT))
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    options = ["--corpus", str(corpus), "--encoder-dtype", "float32", "--out"]
    for command in ("encode-with-ray", "encode"):
        done = CliRunner().invoke(app, ["index", command, *options, str(tmp_path / command)])
        assert done.exit_code == 0, done.output
    by_ray, here = (VectorStore.open(tmp_path / command) for command in ("encode-with-ray", "encode"))
    assert by_ray.manifest.shards == here.manifest.shards
    by_ray.verify()
