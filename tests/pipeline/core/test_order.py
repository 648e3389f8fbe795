"""In which order tasks are begun."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.order import longest_first
from pipeline.core.records import Question


def questions(number: int) -> list[Question]:
    return [Question(f"q{i}", "Who?", ("Ada",)) for i in range(number)]


@given(lengths=st.lists(st.none() | st.integers(0, 9), max_size=30), last=st.integers(0, 40))
def test_only_the_end_is_put_in_order_and_nothing_is_lost(lengths: list[int | None], last: int) -> None:
    tasks = questions(len(lengths))
    known = {
        task.id: float(length) for task, length in zip(tasks, lengths, strict=True) if length is not None
    }
    ordered = longest_first(tasks, known, last)
    begin = max(0, len(tasks) - last)
    assert sorted(task.id for task in ordered) == sorted(task.id for task in tasks)
    assert ordered[:begin] == tasks[:begin]
    end = [known.get(task.id, float("inf")) for task in ordered[begin:]]
    assert end == sorted(end, reverse=True)


def test_without_lengths_the_order_stays() -> None:
    assert longest_first(questions(9), {}, 5) == questions(9)
