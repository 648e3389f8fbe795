"""Batches by length: every row once, padding bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from retriever_service.encoding.token_batches import of_like_length, of_like_size

LENGTHS = st.lists(st.integers(1, 600), max_size=200)


@given(lengths=LENGTHS, multiple=st.integers(1, 16), largest=st.integers(1, 9))
def test_texts_of_one_batch_pad_to_the_same_length(lengths: list[int], multiple: int, largest: int) -> None:
    batches = of_like_length(lengths, multiple, largest)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= largest
        assert len({-(-lengths[row] // multiple) for row in batch}) == 1


@given(lengths=LENGTHS, tokens=st.integers(1, 2_000))
def test_padded_batches_hold_a_bounded_number_of_tokens(lengths: list[int], tokens: int) -> None:
    batches = of_like_size(lengths, tokens)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) * lengths[batch[0]] <= tokens or len(batch) == 1 for batch in batches)


def test_short_texts_share_a_batch_and_a_long_one_is_alone() -> None:
    assert of_like_size([3, 50, 3, 4, 3], tokens=12) == [[1], [3, 0, 2], [4]]
