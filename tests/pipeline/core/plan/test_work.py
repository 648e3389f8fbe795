"""Tokens and time: what a change of the configuration or of an assumption does to them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.config import AgentConfig
from pipeline.core.errors import UserError
from pipeline.core.plan.assumptions import Assumptions, read_assumptions
from pipeline.core.plan.work import ORDERING_TOKENS, sampling_seconds, training_seconds, trajectory
from tests.pipeline.core.plan.shapes import QWEN_SHAPE

AGENT = AgentConfig(max_searches=5, documents=5, max_document_tokens=256, max_turn_tokens=512)
ASSUMED = Assumptions().settled(AGENT, "gpu")
ONE = trajectory(AGENT, ASSUMED)


def test_a_training_on_eight_h100_takes_about_eight_hours() -> None:
    """1.4e9 tokens of a 7B model with gradient checkpointing, at 350 TFLOP/s a GPU: 8F a token."""
    assumed = ASSUMED.model_copy(update={"mfu": 350 / 989})
    seconds = training_seconds(QWEN_SHAPE, 1.4e9, assumed, devices=8, checkpointing=True, adapters_only=False)

    assert seconds / 3_600 == pytest.approx(8.5, abs=0.1)


def test_a_trajectory_is_prompt_turns_and_passages() -> None:
    assert (ONE.total, ONE.written) == (128 + 4 * (5 * 150 + 2 * 60) + 60, 9 * 60)


@pytest.mark.parametrize(
    ("switches", "total"),
    [({"search": False}, 128 + 60), ({"record": False}, 128 + 4 * (5 * 150 + 60) + 60)],
)
def test_actions_that_are_off_take_no_tokens(switches: dict[str, Any], total: float) -> None:
    assert trajectory(AGENT.model_copy(update=switches), ASSUMED).total == total


def test_a_selection_takes_some_tokens_for_each_passage_that_it_names() -> None:
    def written(**agent: Any) -> float:
        return trajectory(AGENT.model_copy(update=agent), ASSUMED).written

    assert written(select=True) == ONE.written + 4 * 2 * ORDERING_TOKENS
    assert written(select=True, selected_documents=9) == ONE.written + 4 * 5 * ORDERING_TOKENS
    assert written(selected_documents=9) == ONE.written
    assert written(select=True, search=False) == written(search=False)


def test_passages_and_turns_are_no_longer_than_configured() -> None:
    agent = AGENT.model_copy(update={"max_document_tokens": 100, "max_turn_tokens": 20})
    assumed = Assumptions().settled(agent, "gpu")

    assert (assumed.passage_tokens, assumed.turn_tokens) == (100, 20)


def sampled(**changes: Any) -> float:
    arguments: dict[str, Any] = {
        "trajectories": 200_000,
        "engines": 8,
        "devices": 1,
        "concurrency": 256,
        "dtype": "bfloat16",
        "token_bytes": 57_344,
    }
    return sampling_seconds(QWEN_SHAPE, ONE, ASSUMED, **(arguments | changes))


def test_twice_the_engines_take_half_the_time() -> None:
    assert sampled(engines=16) == pytest.approx(sampled() / 2)


def test_more_agents_in_flight_share_the_reading_of_the_weights() -> None:
    assert sampled(concurrency=8) > 2 * sampled()


def test_nothing_to_sample_takes_no_time() -> None:
    assert sampled(trajectories=0) == 0


def test_assumptions_of_the_command_line() -> None:
    assert read_assumptions(["mfu=0.5", "searches=2"]) == Assumptions(mfu=0.5, searches=2)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("speed=3", "keys are questions, dev_questions"),
        ("mfu", "give KEY=VALUE"),
        ("mfu=2", "mfu=2: Input should be less"),
    ],
)
def test_an_assumption_that_is_none_is_refused(pair: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_assumptions([pair])
