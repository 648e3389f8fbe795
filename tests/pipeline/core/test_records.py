"""Records keep everything on their way through Arrow and Parquet."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.records import (
    Example,
    Step,
    StopReason,
    Trajectory,
    count_stop_reasons,
    examples_from_table,
    examples_to_table,
    trajectories_from_table,
    trajectories_to_table,
)
from retriever_service.passages.corpus import Passage
from retriever_service.search.search import Hit

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
float32s = st.floats(width=32)
hits = st.builds(Hit, st.builds(Passage, texts, texts, texts), st.floats(width=32, allow_nan=False))
steps = st.builds(Step, texts, st.lists(hits, max_size=3).map(tuple), texts)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(0, 12))
    exactly = {"min_size": length, "max_size": length}
    return Trajectory(
        question_id=draw(texts),
        sample=draw(st.integers(0, 100)),
        policy_version=draw(st.integers(0, 100)),
        token_ids=np.array(draw(st.lists(st.integers(0, 2**31 - 1), **exactly)), dtype=np.int32),
        loss_mask=np.array(draw(st.lists(st.booleans(), **exactly)), dtype=np.bool_),
        logprobs=np.array(draw(st.lists(float32s, **exactly)), dtype=np.float32),
        answer_start=draw(st.integers(0, length)),
        steps=tuple(draw(st.lists(steps, max_size=3))),
        answer=draw(texts),
        stop_reason=draw(st.sampled_from(StopReason)),
        detail=draw(texts),
    )


def through_parquet(table: Any) -> Any:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return pq.read_table(buffer)


@settings(max_examples=30)
@given(originals=st.lists(trajectories(), max_size=4))
def test_trajectories_come_back_as_they_were(originals: list[Trajectory]) -> None:
    copies = trajectories_from_table(through_parquet(trajectories_to_table(originals)))
    assert len(copies) == len(originals)
    for copy, original in zip(copies, originals, strict=True):
        for name in ("token_ids", "loss_mask", "logprobs"):
            np.testing.assert_array_equal(getattr(copy, name), getattr(original, name))
            assert getattr(copy, name).dtype == getattr(original, name).dtype
        for name in ("question_id", "sample", "policy_version", "answer_start", "steps", "answer", "detail"):
            assert getattr(copy, name) == getattr(original, name)
        assert copy.stop_reason is original.stop_reason


@settings(max_examples=30)
@given(source=trajectories(), weight=st.floats(0, 1e300))
def test_weighted_examples_come_back_as_they_were(source: Trajectory, weight: float) -> None:
    original = Example(source.question_id, source.sample, source.token_ids, source.loss_mask, weight)
    (copy,) = examples_from_table(through_parquet(examples_to_table([original])))
    assert (copy.question_id, copy.sample, copy.weight) == (original.question_id, original.sample, weight)
    np.testing.assert_array_equal(copy.token_ids, original.token_ids)
    np.testing.assert_array_equal(copy.loss_mask, original.loss_mask)


def trajectory(**changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "question_id": "q",
        "sample": 0,
        "policy_version": 0,
        "token_ids": np.zeros(3, dtype=np.int32),
        "loss_mask": np.zeros(3, dtype=np.bool_),
        "logprobs": np.zeros(3, dtype=np.float32),
        "answer_start": 3,
        "steps": (),
        "answer": "",
        "stop_reason": StopReason.ANSWERED,
    }
    return Trajectory(**{**fields, **changes})


@pytest.mark.parametrize("changes", [{"loss_mask": np.zeros(2, dtype=np.bool_)}, {"answer_start": 4}])
def test_a_trajectory_that_contradicts_itself_cannot_be_built(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="q/0"):
        trajectory(**changes)


def test_searches_are_counted_and_thoughts_without_search_are_not() -> None:
    hit = Hit(Passage("p", "", "text"), 1.0)
    assert trajectory(steps=(Step("a", (hit,)), Step("b"))).num_searches == 1


def test_stop_reasons_are_counted_with_zeros() -> None:
    counts = count_stop_reasons([trajectory(), trajectory(stop_reason=StopReason.ENGINE_ERROR)])
    assert counts["answered"] == counts["engine_error"] == 1
    assert counts["malformed"] == 0
    assert set(counts) == {reason.value for reason in StopReason}


def test_only_retriever_and_engine_failures_are_infrastructure() -> None:
    assert {reason for reason in StopReason if reason.is_infrastructure} == {
        StopReason.RETRIEVER_UNAVAILABLE,
        StopReason.ENGINE_ERROR,
    }
