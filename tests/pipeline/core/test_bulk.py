"""Records made of columns are those that the constructor makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.bulk import in_bulk
from pipeline.core.records import Step

queries_and_records = st.lists(st.tuples(st.text(), st.text()))


@given(queries_and_records)
def test_they_are_what_the_constructor_makes(rows: list[tuple[str, str]]) -> None:
    queries, records = [query for query, _ in rows], [record for _, record in rows]
    nothing = [""] * len(rows)
    made = in_bulk(Step, queries, [()] * len(rows), records, [()] * len(rows), nothing, nothing)
    assert made == [Step(query, (), record) for query, record in rows]
    assert len({id(step) for step in made}) == len(rows)


@pytest.mark.parametrize("columns", [(["q"], [()]), (["q"], [()], []), ([], [()], [])])
def test_columns_that_do_not_fit_together_are_refused(columns: Sequence[Sequence[Any]]) -> None:
    with pytest.raises(ValueError, match=r"values of (hits|record) for|zip\(\)"):
        in_bulk(Step, *columns)
