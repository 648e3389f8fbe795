"""Records keep everything on their way through Arrow and Parquet."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.records import (
    Episode,
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
from retriever_service.passages.hits import Hit

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
        role=draw(texts),
        log_likelihoods=tuple(draw(st.lists(st.floats(max_value=0.0), max_size=3))),
        proposal_logprobs=draw(
            st.none() | st.lists(float32s, **exactly).map(lambda x: np.array(x, dtype=np.float32))
        ),
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
        assert copy.log_likelihoods == original.log_likelihoods
        if original.proposal_logprobs is None:
            assert copy.proposal_logprobs is None
        else:
            np.testing.assert_array_equal(copy.proposal_logprobs, original.proposal_logprobs)
        for name in (
            "question_id",
            "sample",
            "role",
            "policy_version",
            "answer_start",
            "steps",
            "answer",
            "detail",
        ):
            assert getattr(copy, name) == getattr(original, name)
        assert copy.stop_reason is original.stop_reason


@settings(max_examples=30)
@given(source=trajectories(), weight=st.floats(0, 1e300), width=st.integers(1, 3))
def test_examples_come_back_as_they_were(source: Trajectory, weight: float, width: int) -> None:
    plain = Example.of(source, weight=weight)
    rows = np.arange(plain.num_targets * width, dtype=np.float64).reshape(-1, width)
    per_token = np.arange(len(plain.token_ids)) / 7
    original = replace(plain, unit="pair", streams={**plain.streams, "rows": rows, "token": per_token})
    (copy,) = examples_from_table(through_parquet(examples_to_table([original])))
    assert (copy.id, copy.unit, copy.role) == (original.id, "pair", source.role)
    np.testing.assert_array_equal(copy.token_ids, original.token_ids)
    np.testing.assert_array_equal(copy.loss_mask, original.loss_mask)
    assert copy.streams.keys() == original.streams.keys()
    for name, values in original.streams.items():
        np.testing.assert_array_equal(copy.streams[name], values)


def test_a_gold_answer_without_a_likelihood_comes_back_without_one() -> None:
    original = trajectory(log_likelihoods=(-1.5, float("nan"), float("-inf")))
    (copy,) = trajectories_from_table(through_parquet(trajectories_to_table([original])))
    np.testing.assert_array_equal(copy.log_likelihoods, original.log_likelihoods)


def test_a_table_of_something_else_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="the columns id, unit, streams are missing"):
        examples_from_table(pa.table({"role": [], "token_ids": [], "loss_mask": []}))
    with pytest.raises(ValueError, match=r"the columns .* log_likelihoods, proposal_logprobs are missing"):
        trajectories_from_table(pa.table({"question_id": []}))


@pytest.mark.parametrize("values", [np.zeros(2), np.zeros((2, 5))])
def test_a_stream_that_fits_neither_example_nor_tokens_nor_targets_is_refused(values: Any) -> None:
    mask = np.array([False, True, True, True])
    with pytest.raises(ValueError, match="example q: stream x has the shape"):
        Example("q", "q", "policy", np.zeros(4, np.int32), mask, {"x": values})


def test_a_number_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="example q/0 must have one number as advantage, has no"):
        Example.of(trajectory(), weight=1.0).number("advantage")


def test_an_episode_failed_if_one_of_its_turns_did() -> None:
    good, bad = trajectory(role="a"), trajectory(role="b", stop_reason=StopReason.ENGINE_ERROR)
    assert Episode("q", 0, (good,)).failure is None
    assert Episode("q", 0, (good, bad)).failure is bad
    assert Episode("q", 0, (good, bad)).turn("a") is good
    with pytest.raises(ValueError, match="no turn of the role c"):
        Episode("q", 0, (good,)).turn("c")


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
        StopReason.RETRIEVER_BAD_ANSWER,
        StopReason.ENGINE_ERROR,
    }
