"""What a record refuses, and what it says of itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.core.records import Episode, Example, Step, StopReason, Trajectory, count_stop_reasons
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit


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


def test_only_failures_of_retriever_engine_and_actions_are_infrastructure() -> None:
    assert {reason for reason in StopReason if reason.is_infrastructure} == {
        StopReason.RETRIEVER_UNAVAILABLE,
        StopReason.RETRIEVER_BAD_ANSWER,
        StopReason.ACTION_UNAVAILABLE,
        StopReason.ENGINE_ERROR,
    }
