"""Retrieval that is corrupted on purpose."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.noise import PLACES, depth_with_noise, with_noise
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit


def ranked(count: int) -> list[Hit]:
    return [Hit(Passage(str(rank), "", ""), -float(rank)) for rank in range(count)]


def ranks(hits: list[Hit]) -> list[int]:
    return [int(hit.passage.id) for hit in hits]


def test_without_noise_nothing_more_is_searched_for_and_nothing_is_replaced() -> None:
    assert depth_with_noise(3, 0.0) == 3
    assert ranks(with_noise(ranked(3), "q", 3, 0.0)) == [0, 1, 2]


def test_with_nothing_but_noise_all_that_comes_ranks_far_behind() -> None:
    assert ranks(with_noise(ranked(depth_with_noise(3, 1.0)), "q", 3, 1.0)) == [
        PLACES,
        PLACES + 1,
        PLACES + 2,
    ]


def test_as_many_are_replaced_as_asked_and_it_depends_on_the_query_alone() -> None:
    def wrong(query: str) -> list[bool]:
        return [rank >= PLACES for rank in ranks(with_noise(ranked(PLACES + 2), query, 2, 0.3))]

    queries = [f"who founded {number}?" for number in range(1000)]
    found = [wrong(query) for query in queries]
    assert found == [wrong(query) for query in queries]
    for place in range(2):  # 0.3 and four standard errors, at the first place and at the second
        assert 0.24 < sum(one[place] for one in found) / len(found) < 0.36


@given(
    available=st.integers(0, 300),
    documents=st.integers(1, 120),
    noise=st.floats(0, 1),
    query=st.text(max_size=5),
)
def test_as_many_come_as_without_and_none_twice(
    available: int, documents: int, noise: float, query: str
) -> None:
    hits = ranked(min(available, depth_with_noise(documents, noise)))
    found = ranks(with_noise(hits, query, documents, noise))
    assert len(set(found)) == len(found) == min(documents, available)
    assert all(rank in (place, place + max(PLACES, documents)) for place, rank in enumerate(found))
