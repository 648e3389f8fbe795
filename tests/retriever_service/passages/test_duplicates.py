"""Near-duplicates: copies and near copies go, the first stays, the order stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from retriever_service.passages.corpus import Passage
from retriever_service.passages.duplicates import THRESHOLD, drop_duplicates, first_of_each
from retriever_service.passages.hits import Hit

LONG = " ".join(f"word{i}" for i in range(60))
WORDS = st.lists(st.sampled_from("abc"), max_size=14)


def similarity(a: str, b: str) -> float:
    """The definition, for texts of words: Jaccard similarity of the sets of word triples."""

    def triples(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    return len(triples(a) & triples(b)) / len(triples(a) | triples(b))


def test_near_copy_goes_and_a_text_that_differs_more_stays() -> None:
    near = LONG.replace("word59", "other")
    far = LONG.replace("word30", "other").replace("word10", "other")
    assert similarity(LONG, near) >= THRESHOLD > similarity(LONG, far)
    assert first_of_each([LONG, near, far]) == [0, 2]


def test_similarity_of_exactly_the_threshold_is_enough() -> None:
    words = LONG.split()
    nine, ten = " ".join(words[:11]), " ".join(words[:12])  # triples
    assert similarity(nine, ten) == THRESHOLD
    assert first_of_each([ten, nine]) == first_of_each([nine, ten]) == [0]
    assert first_of_each([nine, " ".join(words[:10])]) == [0, 1]


def test_copies_that_differ_in_case_punctuation_and_spacing_are_one() -> None:
    assert first_of_each(
        ["The Lion, it sleeps.", "the lion  it sleeps", "THE LION: IT SLEEPS!", "the tiger"]
    ) == [0, 3]


def test_texts_without_words_are_compared_too() -> None:
    assert first_of_each(["?!", "...", "?!", ""]) == [0, 1, 3]


def test_short_texts_are_duplicates_only_if_equal() -> None:
    assert first_of_each(["Paris", "Paris France", "paris"]) == [0, 1]


@given(st.lists(WORDS.map(" ".join), max_size=12))
def test_what_stays_is_what_comparing_all_with_all_leaves(texts: list[str]) -> None:
    kept: list[int] = []
    for place, text in enumerate(texts):
        if all(similarity(text, texts[earlier]) < THRESHOLD for earlier in kept):
            kept.append(place)
    assert first_of_each(texts) == kept


def test_of_hits_with_the_same_content_the_best_one_stays() -> None:
    def hit(id_: str, title: str, text: str) -> Hit:
        return Hit(Passage(id_, title, text), 1.0)

    hits = [hit("a", "Lion", "it sleeps"), hit("b", "lion", "It sleeps."), hit("c", "Tiger", "it sleeps")]
    assert [kept.passage.id for kept in drop_duplicates(hits)] == ["a", "c"]
