"""The service as a process with a real index: clients of all dialects, whatever its schema allows, and kill -9."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.index.store import verify_checksums
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import Hit, SearchOptions
from retriever_service.search.engine import SearchEngine
from retriever_service.service.client import RetrieverHttpClient
from tests.retriever_service import search_r1_agent
from tests.retriever_service.support import load_hash_encoder, server_process, write_jsonl

pytestmark = pytest.mark.component

COUNT = 40
open_engine = partial(SearchEngine.open, load_encoder=load_hash_encoder)
serving = partial(server_process, "tests.retriever_service.serving_child")


def write_index(folder: Path, *, bm25: bool) -> Path:
    rows = [
        {
            "id": f"p{i}",
            "title": f'The "{i}"' if i % 3 else "",
            "text": f"number{i} of {i % 7}\nsecond line",
            "metadata": {"year": 1980 + i % 9} if i % 2 else {},
        }
        for i in range(COUNT)
    ]
    corpus = write_jsonl(folder / "c.jsonl", rows)
    build_index([corpus], folder / "index", EncoderSpec("hash"), bm25=bm25, load_encoder=load_hash_encoder)
    return folder / "index"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("served"), bm25=True)


@pytest.fixture(scope="module")
def url(index: Path) -> Iterator[str]:
    with serving(index, read_only=True) as (url, _):
        yield url


def test_http_answers_are_those_of_the_library(index: Path, url: str) -> None:
    """Many clients at once, every method, with and without options; each request several times."""
    rng = random.Random(0)
    filters = (None, Filter.parse({"year": {"gte": 1984}}))
    options = [
        SearchOptions(method, 0, where, frozenset(exclude), distinct)
        for method in ("dense", "bm25", "hybrid")
        for where in filters
        for exclude in ((), ("p1", "p4"))
        for distinct in (False, True)
    ]
    requests = [
        (
            [f"number{rng.randrange(COUNT)} of {rng.randrange(7)}" for _ in range(rng.randrange(3))] + [" "],
            k,
            it,
        )
        for k, it in itertools.product((1, 5, 100), options)
    ]
    engine = open_engine(index)
    expected = [engine.search(*request) for request in requests]
    client = RetrieverHttpClient(url)
    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(lambda request: client.search(*request), requests * 3))
    client.close()
    assert answers == expected * 3


def test_an_agent_that_speaks_only_search_r1_works_unchanged(index: Path, url: str) -> None:
    """In the forms of Search-R1 and verl (with scores), of slime and torchtitan (without), and of SkyRL (one query)."""
    engine = open_engine(index)
    queries = ["number3 of 3", "number12", "the second line"]
    for number in (1, 2, 3):
        expected = engine.search(queries[:number], 4)
        assert search_r1_agent.batch_search(url, queries[:number], topk=4) == list(map(shown, expected))
        for query, hits in zip(queries, expected, strict=False):
            assert search_r1_agent.bare_search(url, query, topk=4) == list(map(bare, hits))
            assert search_r1_agent.singular_search(url, query, topk=4) == shown(hits)


def shown(hits: list[Hit]) -> str:
    return "".join(
        f'Doc {rank}(Title: "{hit.passage.title}") {hit.passage.text}\n'
        for rank, hit in enumerate(hits, start=1)
    )


def bare(hit: Hit) -> str:
    return f'"{hit.passage.title}"\n{hit.passage.text}'


def test_the_original_exsearch_client_finds_title_text_and_probability(index: Path, url: str) -> None:
    reply = httpx.get(f"{url}/api/search", params={"query": "number3 & 4?", "k": "20"}, timeout=60).json()
    (expected,) = open_engine(index).search(["number3 & 4?"], 20)
    assert [(hit["pid"], hit["score"]) for hit in reply["topk"]] == [
        (h.passage.id, h.score) for h in expected
    ]
    assert [hit["text"].split(" | ", 1) for hit in reply["topk"]] == [
        [h.passage.title, h.passage.text] for h in expected
    ]


def test_no_request_imports_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where no more files can be opened an import fails, and a library that is imported by half stays broken."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    new = {"passages": [{"id": "new", "text": "one more"}]}
    with serving(write_index(tmp_path, bm25=True)) as (url, _), httpx.Client(base_url=url) as client:
        assert "import time" in capfd.readouterr().err
        answers = [
            client.post(
                "/search", json={"query": "number1", "method": "hybrid", "filter": {"year": {"gte": 1984}}}
            ),
            client.post("/search", json={"query": "number1", "distinct": True, "exclude": ["p1"]}),
            client.post("/retrieve", json={"queries": ["number1"]}),
            client.get("/api/search", params={"query": "number1"}),
            client.post("/passages", json=new),
            client.request("DELETE", "/passages", json={"ids": ["new"]}),
            client.get("/info"),
            client.get("/metrics"),
            client.get("/openapi.json"),
        ]
        assert {answer.status_code for answer in answers} == {200}
        refused = [client.post("/search", content=b"{"), client.get("/search"), client.get("/nowhere")]
        assert all(400 <= answer.status_code < 500 for answer in refused)
    assert "import time" not in capfd.readouterr().err


def test_schemathesis_finds_the_openapi_schema_true(tmp_path: Path) -> None:
    """It asks whatever the schema allows, and what it forbids: no 5xx, no status or shape that is not declared."""
    command = [sys.executable, "-m", "schemathesis.cli", "run"]
    options = [
        "--header=Authorization: Bearer secret",
        "--phases=examples,coverage,fuzzing",
        "--max-examples=60",
        # Whether an id exists, or words were indexed, no schema tells.
        "--exclude-checks=positive_data_acceptance",
        "--seed=1",
        "--generation-database=none",
        "--no-color",
    ]
    # Not among its own defaults: 413.
    refusals = "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 404, 405, 413, 415, 422]\n"
    (tmp_path / "schemathesis.toml").write_text(refusals)
    with serving(write_index(tmp_path, bm25=True), token="secret") as (url, _):
        command += [f"{url}/openapi.json", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr
    # Every route, the bodies of POST and DELETE included.
    assert "Tested: 9" in done.stdout


# ---------------------------------------------------------------- kill -9


class Writer(threading.Thread):
    """Adds passages one by one and deletes every third of them again, until the server is gone."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(daemon=True)
        self.added: set[str] = set()
        """Acknowledged."""
        self.deleted: set[str] = set()
        """Acknowledged."""
        self.unknown: set[str] = set()
        """Asked for, and never answered."""
        self._client = httpx.Client(base_url=url, timeout=60)
        self._prefix = name

    def run(self) -> None:
        for number in range(10_000):
            id_ = f"{self._prefix}-{number}"
            try:
                self.unknown = {id_}
                passages = [{"id": id_, "text": f"text of {id_}"}]
                self._change("POST", {"passages": passages}, self.added, id_)
                if number % 3 == 0:
                    self.unknown = {id_}
                    self._change("DELETE", {"ids": [id_]}, self.deleted, id_)
            except httpx.TransportError:
                return

    def _change(self, method: str, body: dict[str, Any], acknowledged: set[str], id_: str) -> None:
        reply = self._client.request(method, "/passages", json=body)
        assert reply.status_code == 200, reply.text
        acknowledged.add(id_)
        self.unknown = set()


def keep_searching(url: str, statuses: set[int]) -> None:
    """Until the server is gone."""
    with httpx.Client(base_url=url, timeout=60) as client, suppress(httpx.TransportError):
        while True:
            statuses.add(client.post("/search", json={"query": "text", "k": 50}).status_code)


def test_kill_9_under_load_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    index = write_index(tmp_path, bm25=False)
    there, gone = {f"p{i}" for i in range(COUNT)}, set[str]()
    unknown = set[str]()
    for life, num_changes in enumerate((5, 23, 40)):
        with serving(index) as (url, process):
            writers = [Writer(url, f"life{life}-writer{n}") for n in range(3)]
            statuses = set[int]()
            searching = [threading.Thread(target=keep_searching, args=(url, statuses)) for _ in range(4)]
            for thread in (*searching, *writers):
                thread.start()
            give_up = time.monotonic() + 60
            while not statuses or sum(len(it.added) + len(it.deleted) for it in writers) < num_changes:
                assert time.monotonic() < give_up and all(map(threading.Thread.is_alive, writers))
                time.sleep(0.001)
            process.kill()
            process.wait()
            for thread in (*searching, *writers):
                thread.join(timeout=60)
        assert statuses == {200}
        deleted = set[str]().union(*(it.deleted for it in writers))
        unknown |= set[str]().union(*(it.unknown for it in writers))
        there |= set[str]().union(*(it.added for it in writers)) - deleted
        gone |= deleted
        with serving(index) as (url, _):
            found = searched_through(url)
        assert there - unknown <= found <= there | unknown
        assert not found & gone
        verify_checksums(index)


def searched_through(url: str) -> set[str]:
    """The ids of all passages that the server has."""
    client = RetrieverHttpClient(url)
    try:
        (hits,) = client.search(["text"], 1_000)
        assert len(hits) == httpx.get(f"{url}/info", timeout=60).json()["engine"]["passages"] < 1_000
    finally:
        client.close()
    return {hit.passage.id for hit in hits}
