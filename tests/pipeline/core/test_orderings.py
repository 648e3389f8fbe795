"""Orderings of passages: the numbers of the text are those that are shown, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.orderings import BadOrdering, named_passages, ordering_text, parse_ordering

chosen = st.integers(1, 12).flatmap(lambda count: st.permutations(range(count)))


def test_the_first_passage_shown_is_number_one_and_the_first_in_the_list() -> None:
    # The released code shows passages from 1 on and reads the numbers as places from 0 on: then [1] is the second one,
    # and the last number that is shown means nothing.
    shown = ["first", "second", "third"]
    assert [shown[place] for place in parse_ordering("[1] > [3]", 3, 3)] == ["first", "third"]
    with pytest.raises(BadOrdering, match="not there, of 3"):
        parse_ordering("[0]", 3, 3)


@given(order=chosen, spaces=st.sampled_from([" > ", ">", "  >\n"]))
def test_an_ordering_that_is_written_out_parses_back(order: list[int], spaces: str) -> None:
    text = ordering_text(order).replace(" > ", spaces)
    assert parse_ordering(text, len(order), len(order)) == tuple(order)
    assert named_passages(text, len(order)) == order


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "by their numbers"),
        ("2 > 1", "by their numbers"),
        ("[2] [1]", "by their numbers"),
        ("[2] > [1] >", "by their numbers"),
        ("the best is [2]", "by their numbers"),
        ("[-1]", "by their numbers"),
        ("[2] > [4]", "not there, of 3"),
        ("[2] > [02]", "twice"),
        ("[3] > [2] > [1]", "3 passages, of at most 2"),
    ],
)
def test_what_is_no_ordering_says_why(text: str, why: str) -> None:
    with pytest.raises(BadOrdering, match=why):
        parse_ordering(text, 3, 2)


@given(
    text=st.text(st.sampled_from("[]123 >\n"), max_size=12), count=st.integers(0, 3), most=st.integers(1, 3)
)
def test_what_parses_names_passages_that_are_there_each_once(text: str, count: int, most: int) -> None:
    try:
        places = parse_ordering(text, count, most)
    except BadOrdering:
        return
    assert 1 <= len(places) <= min(count, most)
    assert list(places) == named_passages(text, count)
