"""What the search program scores behind a trajectory, and what becomes of it when scoring fails."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.core.agents.program import Completion, EngineError, Retrieve, Sampling
from pipeline.core.agents.search_program import FurtherSamples, SearchProgram, answer_log_likelihoods
from pipeline.core.config import AgentConfig
from pipeline.core.records import Episode, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from retriever_service.errors import RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

QUESTION = Question("q", "Who founded Orvane?", ("Mara Velin", "M. Velin", "Mara Velin"))
AGENT = AgentConfig(documents=1)
TURNS = ("<think> Who founded Orvane? </think>", "<record> Mara did. </record>\n<answer> Mara </answer>")


class FakeModel:
    """Writes `TURNS`; every token has log q -0.25, every scored one log p -0.5."""

    version = 3

    def __init__(
        self, tokenizer: Any, *, max_length: int = 4096, records_proposal: bool = False, fails: bool = False
    ) -> None:
        self.tokenizer, self.max_length, self.records_proposal = tokenizer, max_length, records_proposal
        self.fails, self.turns = fails, iter(TURNS)
        self.scored: list[tuple[list[int], int]] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        text = next(self.turns)
        ids = self.tokenizer(text)["input_ids"]
        stop = next(s for s in sampling.stop if text.endswith(s))
        return Completion(ids, [-0.25] * len(ids), text, stop, "stop")

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        assert 1 <= start <= len(token_ids) < self.max_length
        if self.fails:
            raise EngineError("busy")
        self.scored.append((list(token_ids), start))
        return [-0.5] * (len(token_ids) - start)


async def retrieve(query: str, k: int) -> list[Hit]:
    return [Hit(Passage("p", "Orvane", "Mara Velin founded it."), 1.0)]


def run(model: FakeModel, find: Retrieve = retrieve, **options: Any) -> Trajectory:
    program = SearchProgram(AGENT, **options)
    episode = asyncio.run(
        program(QUESTION, {"searcher": model}, find, sampling=Sampling(1.0, seed=1), sample=2)
    )
    assert (episode.task_id, episode.sample) == ("q", 2)
    return episode.turn("searcher")


def test_each_different_gold_answer_is_scored_behind_the_answer_tag(tokenizer: Any) -> None:
    model = FakeModel(tokenizer)
    trajectory = run(model, score_answers=True)
    golds = [Renderer(tokenizer, AGENT).answer_ids(answer) for answer in ("Mara Velin", "M. Velin")]
    context = trajectory.token_ids[: trajectory.answer_start].tolist()
    assert model.scored == [([*context, *gold], len(context)) for gold in golds]
    assert trajectory.log_likelihoods == tuple(-0.5 * len(gold) for gold in golds)
    assert (trajectory.policy_version, trajectory.proposal_logprobs) == (3, None)


def test_gold_answers_are_scored_behind_nothing_of_the_models_own_answer(crossing_tokenizer: Any) -> None:
    model = FakeModel(crossing_tokenizer)
    model.turns = iter([TURNS[0], '<record> r </record>\n<answer>"Mara"</answer>'])
    trajectory = run(model, score_answers=True)
    assert trajectory.answer == '"Mara"'
    for ids, start in model.scored:
        assert crossing_tokenizer.decode(ids[:start]).endswith("<record> r </record>\n<answer>")


@pytest.mark.parametrize(
    ("likelihoods", "more"),
    [
        ([(0.2, 0.2), (0.1, 0.39)], 5),
        ([(0.2,), (0.1, 0.6)], 0),
        ([(0.2,), (None,)], 5),
        ([(None,), (None,)], 0),
        ([(float("nan"),), (0.1,)], 5),  # too long for an answer
        ([(float("nan"), 0.6), (0.1,)], 0),
    ],
)
def test_more_are_sampled_where_no_trajectory_makes_an_answer_likelier_than_not(
    tokenizer: Any, likelihoods: list[tuple[float | None, ...]], more: int
) -> None:
    plain = run(FakeModel(tokenizer))
    episodes = []
    for found in likelihoods:
        if found == (None,):  # the engine did not answer
            turn = replace(plain, stop_reason=StopReason.ENGINE_ERROR, log_likelihoods=())
        else:
            turn = replace(plain, log_likelihoods=tuple(np.log(np.array(found, dtype=float)).tolist()))
        episodes.append(Episode("q", 0, (replace(turn, sample=len(episodes)),)))
    assert FurtherSamples(5)(episodes) == more


def test_a_trajectory_that_was_shown_the_answer_does_not_speak_for_the_question(tokenizer: Any) -> None:
    plain = run(FakeModel(tokenizer))
    knew, failed = (
        replace(plain, sample=k, log_likelihoods=(value,)) for k, value in enumerate((-0.01, -9.0))
    )
    episodes = [Episode("q", turn.sample, (turn,)) for turn in (knew, failed)]
    assert FurtherSamples(8)(episodes) == 0
    assert FurtherSamples(8, hinted=1)(episodes) == 8


def test_nothing_is_scored_unless_it_is_asked_for(tokenizer: Any) -> None:
    model = FakeModel(tokenizer)
    assert run(model).log_likelihoods == ()
    assert model.scored == []


def test_a_gold_answer_that_does_not_fit_has_no_likelihood(tokenizer: Any) -> None:
    trajectory = run(FakeModel(tokenizer))
    model = FakeModel(tokenizer, max_length=trajectory.answer_start + 4)
    short, long = asyncio.run(answer_log_likelihoods(trajectory, [[1, 2, 3], [1, 2, 3, 4]], model))
    assert short == -1.5
    assert np.isnan(long)


def test_an_engine_that_does_not_score_ends_the_trajectory_as_a_failure(tokenizer: Any) -> None:
    trajectory = run(FakeModel(tokenizer, fails=True), score_answers=True)
    assert (trajectory.stop_reason, trajectory.detail) == (StopReason.ENGINE_ERROR, "busy")


def test_both_distributions_are_kept_where_they_differ(tokenizer: Any) -> None:
    trajectory = run(FakeModel(tokenizer, records_proposal=True))
    own = trajectory.loss_mask
    assert trajectory.proposal_logprobs is not None
    np.testing.assert_array_equal(trajectory.logprobs[own], np.float32(-0.5))
    np.testing.assert_array_equal(trajectory.proposal_logprobs[own], np.float32(-0.25))
    assert np.isnan(trajectory.logprobs[~own]).all()


def test_each_token_keeps_its_own_log_probability_and_nobody_scores_the_environment(tokenizer: Any) -> None:
    class ByPosition(FakeModel):
        async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
            await super().token_logprobs(token_ids, start)
            return [-float(i) for i in range(start, len(token_ids))]

    model = ByPosition(tokenizer, records_proposal=True)
    trajectory = run(model)
    own = np.flatnonzero(trajectory.loss_mask)
    np.testing.assert_array_equal(trajectory.logprobs[own], -own.astype(np.float32))
    assert model.scored == [(trajectory.token_ids.tolist(), own[0])]


def test_a_model_that_wrote_nothing_usable_has_neither_distribution(tokenizer: Any) -> None:
    model = FakeModel(tokenizer, records_proposal=True)
    model.turns = iter(["<record> out of turn </record> <answer> Mara </answer>"])
    trajectory = run(model)
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert trajectory.proposal_logprobs is not None
    assert np.isnan(trajectory.logprobs).all() and np.isnan(trajectory.proposal_logprobs).all()
    assert model.scored == []


def test_gold_answers_are_scored_in_front_of_every_turn_where_that_is_asked_for(tokenizer: Any) -> None:
    renderer, model = Renderer(tokenizer, AGENT), FakeModel(tokenizer)
    trajectory = run(model, score_answers=True, score_turns="all")
    golds = [renderer.answer_ids(answer) for answer in ("Mara Velin", "M. Velin")]
    ids, (first, second) = trajectory.token_ids.tolist(), trajectory.turn_starts.tolist()
    assert ids[:first] == renderer.prompt_ids(QUESTION.text)
    assert tokenizer.decode(ids[second:]).startswith("<record>")
    tag = renderer.answer_demand_ids(at_turn_start=True)
    contexts = [[*ids[:start], *tag] for start in (first, second)]
    assert model.scored[2:] == [([*context, *gold], len(context)) for context in contexts for gold in golds]
    together = math.log(sum(math.exp(-0.5 * len(gold)) for gold in golds))
    assert trajectory.turn_log_likelihoods == pytest.approx((together, together))
    only_first = run(FakeModel(tokenizer), score_answers=True, score_turns="first")
    assert only_first.turn_log_likelihoods == trajectory.turn_log_likelihoods[:1]


def test_in_front_of_a_turn_only_those_answers_count_that_fit_behind_the_whole(tokenizer: Any) -> None:
    whole = run(FakeModel(tokenizer))
    golds = [Renderer(tokenizer, AGENT).answer_ids(answer) for answer in ("Mara Velin", "M. Velin")]
    assert len(golds[0]) != len(golds[1])
    model = FakeModel(tokenizer, max_length=whole.answer_start + max(map(len, golds)))

    async def score() -> Trajectory:
        program = SearchProgram(AGENT, score_answers=True, score_turns="first")
        return await program._scored(whole, Renderer(tokenizer, AGENT), QUESTION, model)

    trajectory = asyncio.run(score())
    assert np.isnan(trajectory.log_likelihoods).sum() == 1
    assert trajectory.turn_log_likelihoods == pytest.approx((-0.5 * min(map(len, golds)),))


@pytest.mark.parametrize("records_proposal", [False, True])
def test_a_hinted_trajectory_is_scored_and_given_back_behind_the_prompt_without_the_hint(
    tokenizer: Any, records_proposal: bool
) -> None:
    prompts: list[list[int]] = []

    class Watched(FakeModel):
        async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
            prompts.append(list(prompt_ids))
            return await super().generate(prompt_ids, sampling)

    renderer = Renderer(tokenizer, AGENT)
    plain = run(Watched(tokenizer), score_answers=True)  # `run` asks for sample 2
    assert not any("Hint" in tokenizer.decode(prompt) for prompt in prompts)
    prompts.clear()
    model = Watched(tokenizer, records_proposal=records_proposal)
    hinted = run(model, score_answers=True, hinted=3)
    assert prompts[0] == renderer.prompt_ids(QUESTION.text, "Mara Velin")
    assert "the answer is Mara Velin" in tokenizer.decode(prompts[0])
    for name in ("token_ids", "loss_mask", "answer_start", "log_likelihoods", "answer", "steps"):
        np.testing.assert_array_equal(getattr(hinted, name), getattr(plain, name), err_msg=name)
    assert not any("Hint" in tokenizer.decode(ids) for ids, _ in model.scored)
    own = hinted.sampled
    np.testing.assert_array_equal(own, plain.sampled)
    np.testing.assert_array_equal(hinted.logprobs[own], np.float32(-0.5))
    assert hinted.proposal_logprobs is not None
    np.testing.assert_array_equal(hinted.proposal_logprobs[own], np.float32(-0.25))


def test_only_the_first_samples_of_a_question_are_hinted_and_failures_keep_no_hint(tokenizer: Any) -> None:
    model = FakeModel(tokenizer)
    assert run(model, hinted=2).proposal_logprobs is None  # `run` asks for sample 2, the third

    async def gone(query: str, k: int) -> list[Hit]:
        raise RetrieverUnavailable("nobody answers")

    failed = run(FakeModel(tokenizer), gone, hinted=3)
    assert failed.answer_start == len(failed.token_ids)
    assert "Hint" not in tokenizer.decode(failed.token_ids.tolist())


def test_a_trajectory_that_the_infrastructure_ended_is_not_scored(tokenizer: Any) -> None:
    async def gone(query: str, k: int) -> list[Hit]:
        raise RetrieverUnavailable("nobody answers")

    model = FakeModel(tokenizer, records_proposal=True)
    trajectory = run(model, gone, score_answers=True)
    assert trajectory.stop_reason is StopReason.RETRIEVER_UNAVAILABLE
    assert (model.scored, trajectory.log_likelihoods) == ([], ())


@pytest.mark.parametrize("switches", [{"think": False, "search": False, "record": False}])
def test_a_program_can_be_sent_to_a_worker(switches: dict[str, bool]) -> None:
    import pickle

    program = SearchProgram(AgentConfig(**switches), score_answers=True)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(program)) == program
