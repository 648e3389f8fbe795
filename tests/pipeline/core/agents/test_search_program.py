"""What the search program scores behind a trajectory, and what becomes of it when scoring fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.core.agents.program import Completion, EngineError, Retrieve, Sampling
from pipeline.core.agents.search_program import SearchProgram, answer_log_likelihoods
from pipeline.core.config import AgentConfig
from pipeline.core.records import Question, StopReason, Trajectory
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
