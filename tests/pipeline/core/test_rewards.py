"""Rewards of one's own: the one of docs/rewards.md, and small ones for what may go wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import AgentConfig, WeightingConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Episode, Question, Step, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.rewards import load_reward
from pipeline.core.reweighing import Stored, scored_under
from pipeline.core.weighing import Facts, SearchWeights
from pipeline.core.weighting import Scored
from pipeline.methods import load
from pipeline.recipes.grpo import GroupAdvantages
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit
from tests.pipeline.commands_support import TRAIN
from tests.shown import saved_files

QUESTION = Question("q", "Who founded the maker of the Silver Harp?", ("Mara Velin",), hops=2)
HIT = Hit(Passage("p1", "Silver Harp", "The Silver Harp is made by Orvane."), 1.0)


@pytest.fixture(autouse=True)
def own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the page, and one with others, in a folder on the path."""
    at = tmp_path_factory.mktemp("own")
    (at / "rewards.py").write_text(saved_files()["rewards.py"], encoding="utf-8")
    (at / "odd_rewards.py").write_text(
        "NUMBER = 3\n"
        "def half(question, trajectory): return 0.5\n"
        "def negative(question, trajectory): return -1.0\n"
        "def nothing(question, trajectory): return None\n"
        "def endless(question, trajectory): return float('inf')\n"
        "def broken(question, trajectory): return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(at)
    load_reward.cache_clear()


def trajectory(searches: int, answer: str = "Mara Velin", sample: int = 0) -> Trajectory:
    """Some tokens; no answer was scored but one, of likelihood 1 / e."""
    mask = np.array([False, True, True, True])
    return Trajectory(
        question_id="q",
        sample=sample,
        policy_version=0,
        token_ids=np.array([1, 2, 3, 4], dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, np.float32(-0.5), np.float32(np.nan)),
        answer_start=2,
        steps=(Step("Who?", (HIT,)),) * searches,
        answer=answer,
        stop_reason=StopReason.ANSWERED,
        log_likelihoods=(-1.0,),
    )


def weigh(reward: str, *turns: Trajectory, **weighting: Any) -> list[float]:
    """The weights of the trajectories as ExSearch trains them."""
    settings = WeightingConfig(method="reward", reward=reward, merge_copies=False, **weighting)
    weights = SearchWeights(settings, AgentConfig(), "model")
    examples = weights(QUESTION, [Episode("q", t.sample, (t,)) for t in turns]).examples["searcher"]
    return [math.exp(example.number("log_weight")) for example in examples]


@pytest.fixture(autouse=True)
def _renderer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.weighing.renderer_at", lambda path, agent: Renderer(tokenizer, agent))


def test_the_documented_reward_wants_the_answer_and_few_searches() -> None:
    turns = [trajectory(2), trajectory(4, sample=1), trajectory(1, "Mara", sample=2), trajectory(2, "Orvane")]
    found = weigh("rewards:short_and_right", *turns)
    assert found == pytest.approx([1.0, 0.81, 2 / 3, 0.0])
    shared = weigh("rewards:short_and_right", *turns, self_normalised=True)
    assert shared == pytest.approx([weight / sum(found) for weight in found])


def test_grpo_takes_it_as_well_and_may_be_punished() -> None:
    def rewards(name: str) -> list[float]:
        turns = [trajectory(2), trajectory(4, sample=1)]
        weigh = GroupAdvantages(name, "none", "exsearch")
        found: list[float] = weigh(QUESTION, [Episode("q", t.sample, (t,)) for t in turns]).statistics[
            "rewards"
        ]
        return found

    assert rewards("rewards:short_and_right") == pytest.approx([1.0, 0.81])
    assert rewards("odd_rewards:negative") == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "negative",
            "weighting.reward: odd_rewards:negative gives -1.0 for a trajectory of question q; .* at least 0",
        ),
        ("nothing", "gives None .*a finite number"),
        ("endless", "gives inf .*a finite number"),
    ],
)
def test_what_is_no_reward_is_told_with_its_question(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        weigh(f"odd_rewards:{name}", trajectory(1))


def test_a_mistake_in_it_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        weigh("odd_rewards:broken", trajectory(1))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("odd_rewards:NUMBER", "is no function"),
        ("odd_rewards:none", "is no function"),
        ("nowhere:f", "cannot be imported .*PYTHONPATH"),
        (":f", "must be a module and a function, as in rewards:short_and_right"),
    ],
)
@pytest.mark.parametrize("key", ["weighting.reward", "grpo.reward"])
def test_a_function_that_is_not_there_is_refused_before_anything_starts(
    refused: Any, folder: Path, key: str, name: str, why: str
) -> None:
    method = ["recipe=grpo"] if key == "grpo.reward" else ["weighting.method=reward"]
    message = " ".join(refused(*TRAIN, *method, f"{key}={name}").split())
    assert f"{key}: {name}" in message and re.search(why, message)


def test_what_is_known_of_a_runs_trajectories_is_the_runs_own_reward() -> None:
    stored = Stored("q", [Scored(-1.0, -1.0, reward=0.25)], [Facts(0, 1, 1.0, 0.5, 1.0, None, None)], None)
    for reward, expected in (("odd_rewards:half", 0.25), ("f1", 0.5)):
        weighting = WeightingConfig(method="reward", reward=reward)
        (scored,) = scored_under(stored, weighting, from_the_model=True)
        assert scored.reward == expected


def test_other_words_are_refused_with_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"weighting.reward: should be em, f1, accuracy or a function of your own"
    ):
        load(None, ["weighting.method=reward", "weighting.reward=exact"])
