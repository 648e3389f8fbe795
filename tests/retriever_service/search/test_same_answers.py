"""Cached, coalesced, batched, divided into segments or among replicas: every answer is that of a plain search.

The plain search: an engine of one segment that keeps nothing, one query at a time. The indexes are real, with vectors
and words; the encoder hashes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_service.building import build
from retriever_service.building.planner import plan_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions
from retriever_service.search.engine import SearchEngine
from retriever_service.service.batching import BatchingSearcher
from retriever_service.service.cache import CachingSearcher
from tests.retriever_service.support import load_hash_encoder, write_jsonl

Request = tuple[list[str], int, SearchOptions]
Ask = Callable[..., Awaitable[list[list[Hit]]]]

COUNT = 60
NOUNS, PLACES = ("lion", "tiger", "otter", "eagle"), ("river", "cliff", "desert")
QUERIES = (
    "lion",
    "  lion\n",
    "the tiger of the river",
    "otter otter cliff",
    "unicorn",
    "desert 7",
    "the",
    " ",
    "",
)
FILTERS = (None, {"year": {"gte": 1983}}, {"kind": ["a", None], "year": {"lt": 1986}}, {"kind": "nowhere"})
EXCLUDED = ((), ("p0", "p7", "nobody"), tuple(f"p{i}" for i in range(0, COUNT, 2)))
OPTIONS = st.builds(
    lambda method, where, exclude, distinct: SearchOptions(
        method, 0, None if where is None else Filter.parse(where), frozenset(exclude), distinct
    ),
    st.sampled_from(["dense", "bm25", "hybrid"]),
    st.sampled_from(FILTERS),
    st.sampled_from(EXCLUDED),
    st.booleans(),
)
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(QUERIES), max_size=3), st.sampled_from([1, 2, 7, COUNT, 1_000]), OPTIONS
    ),
    min_size=1,
    max_size=8,
)
open_engine = partial(SearchEngine.open, load_encoder=load_hash_encoder)


def rows(numbers: range) -> list[dict[str, Any]]:
    """Equal scores and copies under other ids are frequent; some passages have no metadata."""
    return [
        {
            "id": f"p{i}",
            "title": f"The {NOUNS[i % 4]}" if i % 5 else "",
            "text": f"the {NOUNS[i % 4]} of the {PLACES[i % 3]} {i % 12}",
            "metadata": {"year": 1980 + i % 9, "kind": "ab"[i % 2]} if i % 4 else {},
        }
        for i in numbers
    ]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same passages in one segment; in three; and in those of 40 to which the others were added."""
    folder = tmp_path_factory.mktemp("indexes")
    build_index = partial(
        build.build_index, spec=EncoderSpec("hash"), bm25=True, load_encoder=load_hash_encoder
    )
    corpus = write_jsonl(folder / "c.jsonl", rows(range(COUNT)))
    build_index([corpus], folder / "one")
    with pytest.MonkeyPatch.context() as patch:
        three = (25, 25, COUNT - 50)
        planned = lambda *a, **k: dataclasses.replace(plan_index(*a, **k), segments=three)  # noqa: E731
        patch.setattr(build, "plan_index", planned)
        build_index([corpus], folder / "three")
    build_index([write_jsonl(folder / "40.jsonl", rows(range(40)))], folder / "grown")
    growing = open_engine(folder / "grown")
    for start, stop in ((40, 55), (55, COUNT)):
        whole = open_engine(folder / "one")._index.corpus
        growing.add([whole[row] for row in range(start, stop)])
    assert [len(open_engine(folder / name).manifest.segments) for name in ("three", "grown")] == [3, 3]
    return {name: folder / name for name in ("one", "three", "grown")}


@pytest.fixture(scope="module")
def plain(indexes: dict[str, Path]) -> Callable[[Request], list[list[Hit]]]:
    engine = open_engine(indexes["one"], cached_queries=0)

    @cache
    def search(query: str, k: int, options: SearchOptions) -> list[Hit]:
        (hits,) = engine.search([query], k, options)
        return hits

    return lambda request: [search(query, *request[1:]) for query in request[0]]


def engines(indexes: dict[str, Path], *names: str) -> list[SearchEngine]:
    return [open_engine(indexes[name]) for name in names]


def in_turn(searchers: Sequence[Any]) -> Ask:
    turn = itertools.cycle(searchers)
    return lambda *request: next(turn).search(*request)


class Unbatched:
    """One request after the other, each as it is."""

    def __init__(self, engine: SearchEngine) -> None:
        self._engine = engine

    async def search(self, *request: Any) -> list[list[Hit]]:
        return self._engine.search(*request)


def batched(*engines: SearchEngine) -> list[BatchingSearcher[SearchEngine]]:
    return [BatchingSearcher(lambda engine=engine: engine, max_batch=4) for engine in engines]


def cached(*engines: SearchEngine, max_answers: int = 5) -> list[CachingSearcher]:
    return [CachingSearcher(batcher, max_answers=max_answers) for batcher in batched(*engines)]


WAYS: dict[str, tuple[tuple[str, ...], Callable[..., list[Any]]]] = {
    "one after the other": (("one",), lambda *it: [Unbatched(engine) for engine in it]),
    "three segments": (("three",), lambda *it: [Unbatched(engine) for engine in it]),
    "grown by additions": (("grown",), lambda *it: [Unbatched(engine) for engine in it]),
    "batched": (("one",), batched),
    "cached and coalesced": (("one",), cached),
    "three replicas": (("one",) * 3, batched),
    "cached replicas of segments": (("three", "three", "grown"), partial(cached, max_answers=100)),
}


@pytest.mark.parametrize("way", WAYS)
def test_answer_is_that_of_a_plain_search(
    indexes: dict[str, Path], plain: Callable[[Request], list[list[Hit]]], way: str
) -> None:
    names, wrap = WAYS[way]
    opened = engines(indexes, *names)

    @settings(max_examples=40)
    @given(rounds=st.lists(REQUESTS, min_size=1, max_size=2))
    def check(rounds: list[list[Request]]) -> None:
        async def scenario() -> None:
            ask = in_turn(wrap(*opened))
            for requests in rounds:
                answers = await asyncio.gather(*(ask(*request) for request in requests))
                assert answers == [plain(request) for request in requests]

        asyncio.run(scenario())

    check()


@settings(max_examples=25)
@given(questions=st.lists(st.tuples(st.sampled_from(QUERIES), st.integers(1, COUNT + 1)), max_size=12))
def test_client_of_several_replicas_answers_as_a_plain_search(
    indexes: dict[str, Path],
    plain: Callable[[Request], list[list[Hit]]],
    questions: list[tuple[str, int]],
) -> None:
    pytest.importorskip("ray")
    from actors.retriever import ActorReplica, RetrieverClient

    async def scenario() -> None:
        client = RetrieverClient(
            [
                ActorReplica(SimpleNamespace(search=SimpleNamespace(remote=replica.search)))
                for replica in batched(*engines(indexes, "one", "three"))
            ]
        )
        answers = await asyncio.gather(*(client.search(*question) for question in questions))
        assert answers == [plain(([query], k, DEFAULT_OPTIONS))[0] for query, k in questions]

    asyncio.run(scenario())
