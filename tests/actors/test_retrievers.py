"""A run's retriever whose encoder is trained and then searched with, on a real Ray cluster."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import psutil
import pytest
import ray
import torch

from actors.observer import Observer
from actors.retrievers import Retrievers
from pipeline.core.config import RetrieverConfig
from pipeline.core.errors import UserError
from pipeline.core.retrieval import Servers
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.index.store import INDEX_FILE
from retriever_service.machine import available_cores
from tests.actors.encoders import PEOPLE, TOWNS, build_encoder
from tests.retriever_service.page_cache import cool, resident
from tests.retriever_service.support import write_jsonl


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def spec(encoder: Path) -> EncoderSpec:
    return EncoderSpec(str(encoder), dtype="float32")


def found(retrievers: Retrievers) -> list[str]:
    """The best passage for each person."""
    return [asyncio.run(retrievers.client.search(person, 1))[0].passage.text for person in PEOPLE]


@pytest.mark.component
def test_after_reindexing_the_new_encoder_searches_and_the_old_index_is_never_answered_from(
    tmp_path: Path, cluster: None, trained_encoder: Path
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": t, "title": "", "text": t} for t in TOWNS])
    corpus, first = [str(tmp_path / "corpus.jsonl")], build_encoder(tmp_path / "first")
    build_index(corpus, tmp_path / "old", spec(first))
    config = RetrieverConfig(max_attempts=1, timeout_s=30, replicas=2)
    retrievers = Retrievers(config, tmp_path / "old", runtime_env={}, start_timeout_s=120)
    retrievers.wait()
    before, old = found(retrievers), retrievers.client
    assert before != list(TOWNS)

    meanwhile: list[Any] = []

    def look(done: int, total: int) -> None:
        """While the new index is made, somebody asks the old replicas."""
        if not meanwhile:
            with pytest.raises(RetrieverUnavailable):
                asyncio.run(old.search(PEOPLE[0], 1))
            meanwhile.append(done)

    retrievers.reindex(spec(trained_encoder), corpus, tmp_path / "new", look)
    assert meanwhile
    assert found(retrievers) == list(TOWNS)
    with pytest.raises(RetrieverUnavailable):
        asyncio.run(old.search(PEOPLE[0], 1))
    retrievers.close()


@pytest.mark.component
@pytest.mark.parametrize("how", ["frozen", pytest.param("searches for ever", marks=pytest.mark.chaos)])
def test_a_replica_that_hangs_is_started_again_while_the_other_answers(
    tmp_path: Path, cluster: None, trained_encoder: Path, how: str
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": t, "title": "", "text": t} for t in TOWNS])
    build_index([str(tmp_path / "corpus.jsonl")], tmp_path / "index", spec(trained_encoder))
    config, restarted = RetrieverConfig(timeout_s=4, replicas=2), list[str]()
    observer = Observer(on_restart=restarted.append)
    retrievers = Retrievers(
        config, tmp_path / "index", runtime_env={}, start_timeout_s=120, observer=observer
    )
    retrievers.wait()
    before = replicas()
    if how == "frozen":
        hung = before[0]
        hung.suspend()
    else:
        hung = psutil.Process(search_for_ever(retrievers._actors[0]))

    async def search_until_it_is_replaced() -> None:
        async with retrievers.at_work(), asyncio.timeout(120):
            while set(replicas()) <= set(before):
                for person, town in zip(PEOPLE, TOWNS, strict=True):
                    assert (await retrievers.client.search(person, 1))[0].passage.text == town
            while not restarted:
                await asyncio.sleep(0.1)
            await asyncio.to_thread(retrievers.wait)

    asyncio.run(search_until_it_is_replaced())
    assert restarted == ["retriever"]
    assert not hung.is_running()
    assert len(replicas()) == 2
    assert found(retrievers) == list(TOWNS)
    retrievers.close()


@pytest.mark.component
def test_replicas_of_a_node_share_its_cores_and_are_ready_when_a_cold_index_is_in_memory(
    tmp_path: Path, cluster: None
) -> None:
    chosen, words = random.Random(0), (*PEOPLE, *TOWNS)
    rows = [{"id": f"{n}", "text": " ".join(chosen.choices(words, k=4))} for n in range(6_000)]
    corpus = str(write_jsonl(tmp_path / "corpus.jsonl", rows))
    encoder = spec(build_encoder(tmp_path / "encoder"))
    build_index([corpus], tmp_path / "index", encoder, factory="IVF32,Flat")
    vectors = cool(tmp_path / "index")[0]
    config = RetrieverConfig(replicas=2, search_parameters="nprobe=1")  # a search reads one of 32 lists
    retrievers = Retrievers(config, tmp_path / "index", runtime_env={}, start_timeout_s=120)
    retrievers.wait()
    assert vectors.name == INDEX_FILE
    assert resident(vectors) == 1
    share = max(1, available_cores() // 2)
    assert [threads(actor) for actor in retrievers._actors] == [(share, share)] * 2
    retrievers.close()


@pytest.mark.component
def test_replicas_search_a_copy_of_their_node_s_own_and_say_which_key_names_a_folder_that_cannot_be(
    tmp_path: Path, cluster: None, trained_encoder: Path
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": t, "title": "", "text": t} for t in TOWNS])
    build_index([str(tmp_path / "corpus.jsonl")], tmp_path / "index", spec(trained_encoder))
    config = RetrieverConfig(replicas=2, local_copy=str(tmp_path / "nvme"), timeout_s=30)
    retrievers = Retrievers(config, tmp_path / "index", runtime_env={}, start_timeout_s=120)
    retrievers.wait()
    shutil.rmtree(tmp_path / "index" / "segments")
    assert found(retrievers) == list(TOWNS)
    assert len(list((tmp_path / "nvme").glob("index-*"))) == 1
    retrievers.close()

    config = RetrieverConfig(local_copy=str(tmp_path / "corpus.jsonl"))
    retrievers = Retrievers(config, tmp_path / "index", runtime_env={}, start_timeout_s=120)
    with pytest.raises(
        RetrieverError, match=r"retriever\.local_copy: .*index cannot be copied to .*corpus\.jsonl"
    ):
        retrievers.wait()
    retrievers.close()


def threads(replica: Any) -> tuple[int, int]:
    """Of its encoder, and of FAISS in the thread that searches."""

    def count(actor: Any) -> tuple[int, int]:
        return torch.get_num_threads(), actor._owner.submit(faiss.omp_get_max_threads).result()

    return ray.get(replica.__ray_call__.remote(count))  # type: ignore[no-any-return]


def search_for_ever(replica: Any) -> int:
    """Its process goes on answering, but for searches."""

    def block(actor: Any) -> int:
        actor._owner.submit(
            actor._call, lambda engine: setattr(engine, "search", lambda *a, **k: time.sleep(3600))
        )
        return os.getpid()

    return ray.get(replica.__ray_call__.remote(block))  # type: ignore[no-any-return]


def replicas() -> list[psutil.Process]:
    ours = psutil.Process().children(recursive=True)
    return [p for p in ours if "RetrieverActor" in p.name() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_index_of_servers_is_not_a_runs_to_change() -> None:
    retrievers = Retrievers(
        RetrieverConfig(url=("http://127.0.0.1:1",)),
        Servers((object(),), "x"),  # type: ignore[arg-type]
        runtime_env={},
        start_timeout_s=1,
    )
    with pytest.raises(UserError, match=r"retriever\.url: a run cannot change the index of servers"):
        retrievers.reindex(EncoderSpec("minilm"), ["corpus.jsonl"], Path("new"))
