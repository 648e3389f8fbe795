"""Engines in several processes: the answers of one engine, whatever happens to a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.index.updates import delete_passages
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import SearchOptions
from retriever_service.search.engine import SearchEngine
from retriever_service.service.engine_processes import EngineProcesses, engine_opener
from tests.retriever_service.support import load_hash_encoder, write_jsonl

WORDS = ["lion", "tiger", "otter", "eagle", "river", "cliff", "desert"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    rows = [
        {"id": f"p{n}", "text": f"{WORDS[n % 7]} {WORDS[n % 5]} {n}", "metadata": {"n": n}} for n in range(40)
    ]
    corpus = write_jsonl(folder / "c.jsonl", rows)
    build_index(
        [corpus],
        folder / "index",
        EncoderSpec("hash"),
        load_encoder=load_hash_encoder,
        workers=1,
        bm25=True,
    )
    return folder / "index"


@pytest.fixture(scope="module")
def engines(index: Path) -> Iterator[EngineProcesses]:
    with closing(EngineProcesses(opener(index), 2, threads=1)) as engines:
        yield engines


def opener(index: Path) -> partial[SearchEngine]:
    return partial(SearchEngine.open, index, load_encoder=load_hash_encoder, num_threads=1)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    queries=st.lists(st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join), max_size=6),
    k=st.integers(1, 50),
    options=st.builds(
        SearchOptions,
        method=st.sampled_from(["dense", "bm25", "hybrid"]),
        where=st.sampled_from([None, Filter.parse({"n": {"lt": 20}})]),
        exclude=st.frozensets(st.sampled_from(["p1", "p2", "p30"])),
        distinct=st.booleans(),
    ),
)
def test_a_divided_batch_is_answered_as_a_whole_one(
    engines: EngineProcesses, index: Path, queries: list[str], k: int, options: SearchOptions
) -> None:
    assert engines.search(queries, k, options) == opener(index)().search(queries, k, options)
    assert engines.fingerprint == opener(index)().fingerprint


def test_a_failed_search_does_not_shift_the_answers_of_the_next(engines: EngineProcesses) -> None:
    before = engines.search(["lion", "tiger"], 3)
    with pytest.raises(RetrieverError, match="re-ranker"):
        engines.search(["lion", "tiger"], 3, SearchOptions(rerank=5))
    assert engines.search(["lion", "tiger"], 3) == before


def test_stages_of_every_process_are_reported(engines: EngineProcesses) -> None:
    stages: list[str] = []
    engines.on_stage = lambda name, seconds: stages.append(name)
    engines.search(["lion", "tiger"], 3)
    engines.on_stage = None
    assert sorted(stages) == ["encode", "encode", "fetch", "fetch", "search", "search"]


def test_an_update_is_seen_by_all_processes_when_it_returns(engines: EngineProcesses) -> None:
    before = engines.fingerprint
    assert engines.add([Passage("new", "", "zebra")]) == 41
    assert engines.fingerprint != before
    for hits in engines.search(["zebra", "zebra"], 1):
        assert [hit.passage.id for hit in hits] == ["new"]
    assert engines.delete(["new"]) == 40
    for hits in engines.search(["zebra", "zebra"], 50):
        assert "new" not in {hit.passage.id for hit in hits}
    with pytest.raises(RetrieverError, match="'new'"):
        engines.delete(["new"])


def test_a_process_that_died_is_replaced(index: Path, tmp_path: Path) -> None:
    with closing(EngineProcesses(opener(index), 2, threads=1)) as engines:
        before = engines.search(["lion", "tiger"], 3)
        first, second = (worker.pid for worker in engines.workers)
        os.kill(second, signal.SIGKILL)
        with pytest.raises(RetrieverUnavailable, match="SIGKILL"):
            engines.search(["lion", "tiger"], 3)
        # An update by somebody else meanwhile: the new process may not be ahead of the others.
        (hit, *_), _ = before
        delete_passages(index, [hit.passage.id])
        for hits in engines.search(["lion", "lion"], 50):
            assert hit.passage.id not in {found.passage.id for found in hits}
        assert engines.workers[0].pid == first


def test_an_index_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="is not a built index"):
        EngineProcesses(opener(tmp_path / "nowhere"), 2, threads=1)


@pytest.mark.parametrize(("threads", "processes"), [(2, 3), (2, 0), (0, None)])
def test_threads_are_enough_for_all_processes(tmp_path: Path, threads: int, processes: int | None) -> None:
    with pytest.raises(RetrieverError, match="at least one"):
        engine_opener(tmp_path, threads=threads, processes=processes)


def test_one_thread_needs_no_further_process(tmp_path: Path) -> None:
    opened = engine_opener(tmp_path, threads=1)
    assert isinstance(opened, partial)
    assert opened.func == SearchEngine.open
