"""How DRO and the preference recipe make examples of a question's episodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline import methods
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import AgentConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Episode, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.recipes import dro, preference
from pipeline.recipes.dro import PermutationWeights
from pipeline.recipes.preference import Pairs

QUESTION = Question("q", "Who?", ("Mara Velin", "M. Velin"))


def turn(role: str, sample: int, *likelihoods: float, reason: StopReason = StopReason.ANSWERED) -> Trajectory:
    transcript = Transcript([1, 2, 3], [False, True, True], [math.nan, -0.1, -0.1])
    made = transcript.trajectory(
        question_id="q", sample=sample, role=role, policy_version=0, stop_reason=reason, answer_start=3
    )
    return Trajectory(**{f: getattr(made, f) for f in made.__slots__} | {"log_likelihoods": likelihoods})


# ---------------------------------------------------------------- DRO


def selection(sample: int, *likelihoods: float, reason: StopReason = StopReason.ANSWERED) -> Episode:
    turns = (turn("selector", sample, reason=reason), turn("generator", sample, *likelihoods))
    return Episode("q", sample, turns)


@pytest.fixture
def weigh(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> PermutationWeights:
    monkeypatch.setattr("pipeline.recipes.dro.renderer_at", lambda path, agent: Renderer(tokenizer, agent))
    return PermutationWeights(AgentConfig(), "model")


def test_selections_are_weighted_against_each_other_within_a_question(weigh: PermutationWeights) -> None:
    weighted = weigh(QUESTION, [selection(0, -1.0, -5.0), selection(1, -9.0, -2.0), selection(2, -7.0, -6.0)])
    likelihoods = np.exp([[-1.0, -5.0], [-9.0, -2.0], [-7.0, -6.0]]).sum(axis=1)
    expected = likelihoods / likelihoods.sum()
    for name in ("selector", "generator"):
        weights = [math.exp(example.number("log_weight")) for example in weighted.examples[name]]
        assert weights == pytest.approx(expected.tolist())
        assert len(set(weights)) == 3


def test_the_selector_learns_what_it_wrote_and_the_generator_the_likeliest_gold_answer(
    weigh: PermutationWeights, tokenizer: Any
) -> None:
    weighted = weigh(QUESTION, [selection(0, -5.0, -1.0), selection(1, -9.0, -9.0)])
    (selected, _), (answered, _) = weighted.examples["selector"], weighted.examples["generator"]
    assert selected.token_ids.tolist() == [1, 2, 3]
    assert tokenizer.decode(answered.token_ids[3:].tolist()) == " M. Velin </answer>"


def test_malformed_selections_and_failures_take_no_part_and_are_counted(weigh: PermutationWeights) -> None:
    failed = Episode("q", 2, (turn("generator", 2, reason=StopReason.ENGINE_ERROR),))
    good = [selection(0, -1.0, -1.0), selection(3, -1.0, -1.0)]
    episodes = [*good, selection(1, -0.1, -0.1, reason=StopReason.MALFORMED), failed]
    weighted = weigh(QUESTION, episodes)
    assert [e.id for e in weighted.examples["selector"]] == ["q/0", "q/3"]
    report = weigh.summarise([weighted.statistics])
    assert report["stop_reasons"]["malformed"] == report["stop_reasons"]["engine_error"] == 1


def test_a_generator_that_failed_and_an_answer_that_does_not_fit_are_counted_as_such(
    weigh: PermutationWeights,
) -> None:
    good = [selection(0, -1.0, -1.0), selection(1, -2.0, -1.0)]
    whole = selection(2, -1.0, -1.0)
    down = Episode("q", 2, (whole.turns[0], turn("generator", 2, reason=StopReason.ENGINE_ERROR)))
    too_long = selection(3, math.nan, math.nan)
    report = weigh.summarise([weigh(QUESTION, [*good, down, too_long]).statistics])
    assert (report["stop_reasons"]["answered"], report["stop_reasons"]["engine_error"]) == (3, 1)
    assert (report["excluded_too_long_to_score"], report["excluded"]) == (1, 2)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["dro.candidates=4", "dro.chosen=5"], "lower the first or raise the second"),
        (["agent.layout=chat"], "say in agent.instructions"),
    ],
)
def test_settings_with_which_dro_is_not_what_it_says_are_refused(keys: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        dro.check(methods.load(None, ["recipe=dro", *keys]))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["rollout.samples=1"], "needs rollout.samples of at least 2"),
        (["cold_start.mix=0.5", "cold_start.questions=4"], "has no weights"),
    ],
)
def test_settings_with_which_preferences_are_none_are_refused(keys: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        preference.check(methods.load(None, ["recipe=preference", *keys]))


def test_each_method_knows_how_many_samples_a_question_has_at_most() -> None:
    def most(*keys: str) -> int:
        return methods.load(None, ["rollout.samples=2", *keys]).most_samples

    assert most("recipe=dro", "dro.permutations=6") == 6
    assert most("em.further_samples=5") == 7
    assert (most(), most("recipe=grpo")) == (2, 2)


# ---------------------------------------------------------------- preference


def searched(sample: int, *likelihoods: float, reference: float | None = -3.0) -> Episode:
    scores = {} if reference is None else {"reference_logprob": reference}
    return Episode("q", sample, (turn("searcher", sample, *likelihoods),), scores)


def test_the_best_trajectory_is_preferred_to_the_worst() -> None:
    episodes = [searched(0, -4.0, -2.0), searched(1, -9.0, -8.0, reference=-5.0), searched(2, -0.5, -7.0)]
    weighted = Pairs(least_gap=1.0)(QUESTION, episodes)
    chosen, rejected = weighted.examples["searcher"]
    assert (chosen.id, chosen.number("label"), chosen.number("reference_logprob")) == ("q/2", 1.0, -3.0)
    assert (rejected.id, rejected.number("label"), rejected.number("reference_logprob")) == (
        "q/1",
        -1.0,
        -5.0,
    )
    assert chosen.unit == rejected.unit == "q"


@pytest.mark.parametrize(
    "episodes",
    [
        [searched(0, -1.0, -1.0), searched(1, -1.5, -1.5)],
        [searched(0, -1.0, -1.0)],
        [searched(0, -1.0, -1.0), searched(1, -9.0, -9.0, reference=None)],
        [searched(0, -1.0, -1.0), searched(1, math.nan, math.nan)],
    ],
    ids=["too near", "alone", "one without a reference", "one without a likelihood"],
)
def test_without_two_that_differ_enough_there_is_no_pair(episodes: list[Episode]) -> None:
    pairs = Pairs(least_gap=1.0)
    weighted = pairs(QUESTION, episodes)
    assert weighted.examples["searcher"] == []
    with pytest.raises(RuntimeError, match=r"preference\.least_gap"):
        pairs.summarise([weighted.statistics])
