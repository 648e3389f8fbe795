"""What an E-step is given, and dev and test questions are not: hints, scores of turns, further samples."""

from __future__ import annotations

from typing import Any

from pipeline.core.agents.search_program import FurtherSamples
from pipeline.core.config import Config
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.em import ExpectationMaximisation


class Programs:
    """The part of a run that takes programs; remembers what each step was given."""

    def __init__(self, **sections: Any) -> None:
        self.config = Config.model_validate(sections)
        self.given: dict[str, Any] = {}

    def begin_sampling(self, t: int, program: Any, roles: Any, weigh: Any, **options: Any) -> None:
        self.given["sample"] = program
        self.given["weigh"] = weigh
        self.given["further"] = options["further"]

    def begin_evaluation(self, t: int, program: Any, roles: Any, **options: Any) -> None:
        self.given["dev"] = program

    def test(self, name: str, program: Any, roles: Any, **options: Any) -> None:
        self.given[name] = program

    def train(self, t: int, name: str, loss: Any, **options: Any) -> None:
        self.given["loss"] = loss


def given(**sections: Any) -> dict[str, Any]:
    run: Any = Programs(**sections)
    steps = ExpectationMaximisation(run, cold_start=None)
    steps.report = lambda: {}  # type: ignore[method-assign]
    steps.begin_e_step(1, 0)
    steps.m_step(1)
    steps.begin_dev(1)
    steps.test("best", 1)
    steps.test("one_search", 1, think=False)
    return dict(run.given)


def test_dev_and_test_questions_are_never_hinted_and_their_turns_never_scored() -> None:
    found = given(
        em={"hinted": 2},
        rollout={"samples": 4},
        weighting={"correct_proposal": True, "credit": "turn"},
    )
    assert (found["sample"].hinted, found["weigh"].hinted, found["sample"].score_turns) == (2, 2, "all")
    for name in ("dev", "best", "one_search"):
        assert (found[name].hinted, found[name].score_answers, found[name].score_turns) == (0, False, "none")


def test_further_samples_are_asked_for_in_the_e_step_and_weighed_against_the_usual_number() -> None:
    found = given(em={"further_samples": 6}, rollout={"samples": 3})
    assert (found["further"], found["weigh"].usual) == (FurtherSamples(6), 3)
    assert (given()["further"], given()["weigh"].usual) == (None, None)
    hinted = given(em={"further_samples": 6, "hinted": 1}, weighting={"correct_proposal": True})
    assert hinted["further"] == FurtherSamples(6, hinted=1)


def test_the_loss_weighs_tokens_where_turns_are_credited() -> None:
    assert given(weighting={"credit": "turn"})["loss"] == WeightedNll(1e-3, by_token=True)
    assert given()["loss"] == WeightedNll(1e-3)


def test_without_hints_and_credits_nothing_more_is_scored() -> None:
    found = given()
    assert (found["sample"].hinted, found["sample"].score_turns) == (0, "none")
    assert given(weighting={"subtract_baseline": True})["sample"].score_turns == "first"
