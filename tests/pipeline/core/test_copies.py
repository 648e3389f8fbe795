"""Exact copies become one example of their summed weight, and nothing else does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.copies import copies_of, merge_copies
from pipeline.core.records import Example

logs = st.one_of(st.just(-math.inf), st.floats(-2000, 0))


def example(
    sample: int, tokens: list[int], mask: list[bool], log_weight: float, credit: list[float]
) -> Example:
    return Example(
        f"q/{sample}",
        "q",
        "searcher",
        np.array(tokens, dtype=np.int32),
        np.array(mask, dtype=np.bool_),
        {"log_weight": np.array([log_weight]), "credit": np.array(credit)},
    )


def ones(sample: int, log_weight: float, tokens: list[int], mask: list[bool] | None = None) -> Example:
    return example(sample, tokens, mask or [True] * len(tokens), log_weight, [1.0] * len(tokens))


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), logs, st.floats(0, 3)), max_size=8))
def test_every_target_weighs_as_much_as_its_copies_together(
    rows: list[tuple[int, bool, float, float]],
) -> None:
    apart = [
        example(k, [7, token], [False, is_target], log, [1.0, credit])
        for k, (token, is_target, log, credit) in enumerate(rows)
    ]
    merged = merge_copies(apart)
    assert sum(map(copies_of, merged)) == len(apart)
    assert len(merged) == len({(token, is_target) for token, is_target, _, _ in rows})

    def token_weight(examples: list[Example], like: Example) -> float:
        """In units of the largest weight there is."""
        top = max((log for _, _, log, _ in rows if log > -math.inf), default=0.0)
        return sum(
            math.exp(e.number("log_weight") - top) * float(e.streams["credit"][1])
            for e in examples
            if e.token_ids.tolist() == like.token_ids.tolist()
            and e.loss_mask.tolist() == like.loss_mask.tolist()
        )

    for one in merged:
        assert token_weight([one], one) == pytest.approx(token_weight(apart, one), rel=1e-9)


def test_weights_too_small_for_a_number_are_summed_too() -> None:
    (one,) = merge_copies([ones(0, -3000.0, [1, 2]), ones(3, -3000.0, [1, 2])])
    assert one.number("log_weight") == pytest.approx(-3000.0 + math.log(2))
    assert one.id == "q/0"


def test_the_same_tokens_with_other_targets_are_no_copies() -> None:
    apart = [ones(0, -1.0, [1, 2]), ones(1, -1.0, [1, 2], [False, True]), ones(2, -1.0, [1, 2, 3])]
    assert merge_copies(apart) == apart


def test_copies_without_any_weight_have_none_and_stay_a_number() -> None:
    (one,) = merge_copies([ones(0, -math.inf, [1, 2]), ones(1, -math.inf, [1, 2])])
    assert one.number("log_weight") == -math.inf
    assert one.streams["credit"].tolist() == [1.0, 1.0]
