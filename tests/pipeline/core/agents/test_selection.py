"""The selector and the generator: what they are shown, what a selection means, and how failures end an episode."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.agents.program import Completion, EngineError, Sampling
from pipeline.core.agents.selection import (
    SelectThenAnswer,
    answer_prompt,
    select_prompt,
    selection_ids,
)
from pipeline.core.config import AgentConfig
from pipeline.core.orderings import named_passages
from pipeline.core.records import Episode, Question, StopReason
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

QUESTION = Question("q", "Who founded Orvane?", ("Mara Velin",))
HITS = [Hit(Passage(f"p{i}", f"Title {i}", f"text {i}."), 1.0 - i / 10) for i in range(5)]
AGENT = AgentConfig()


class Model:
    """Writes one text, or fails."""

    version, max_length, records_proposal = 2, 4096, False

    def __init__(self, tokenizer: Any, text: str, fails: bool = False) -> None:
        self.tokenizer, self.text, self.fails = tokenizer, text, fails
        self.prompts: list[str] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        if self.fails:
            raise EngineError("busy")
        self.prompts.append(self.tokenizer.decode(prompt_ids))
        ids = self.tokenizer(self.text)["input_ids"]
        stop = next((s for s in sampling.stop if self.text.endswith(s)), None)
        return Completion(ids, [-0.5] * len(ids), self.text, stop, "stop" if stop else "length")

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        return [-0.25] * (len(token_ids) - start)


async def retrieve(query: str, k: int) -> list[Hit]:
    assert query == QUESTION.text
    return HITS[:k]


def run(selector: Model, generator: Model, find: Any = retrieve, **options: Any) -> Episode:
    program = SelectThenAnswer(AGENT, candidates=4, chosen=2, **options)
    roles = {"selector": selector, "generator": generator}
    return asyncio.run(program(QUESTION, roles, find, sampling=Sampling(1.0, seed=1), sample=3))


@pytest.fixture
def make(tokenizer: Any) -> Any:
    return lambda text, **options: Model(tokenizer, text, **options)


def test_the_generator_sees_the_passages_in_the_order_in_which_they_were_named(make: Any) -> None:
    selector, generator = make(" [3] > [1] </record>"), make(" Mara </answer>")
    selection, answer = run(selector, generator).turns
    (prompt,) = generator.prompts
    assert prompt.index("[1] Title 2") < prompt.index("[2] Title 0")
    assert "Title 1" not in prompt and "Title 3" not in prompt
    assert [hit.passage.id for hit in answer.steps[0].hits] == ["p2", "p0"]
    assert (selection.stop_reason, answer.answer) == (StopReason.ANSWERED, "Mara")
    assert selector.prompts[0].endswith("<record>")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (" [9] > [2] </record>", ["p1", "p0"]),
        (" nonsense </record>", ["p0", "p1"]),
        (" [2] > [4]", ["p1", "p3"]),
        (" [3] > [1] > [4] </record>", ["p2", "p0"]),
        (" [3] > [1] [1] and so on </record>", ["p2", "p0"]),
        (" [3] > [3] </record>", ["p2", "p0"]),
        (" [3] </record>", ["p2", "p0"]),
    ],
    ids=[
        "a number that no passage has",
        "nothing",
        "not closed",
        "too many",
        "more text",
        "twice",
        "too few",
    ],
)
def test_what_a_malformed_selection_leaves_open_the_retrievers_order_fills(
    make: Any, text: str, chosen: list[str]
) -> None:
    selection, _ = run(make(text), make(" Mara </answer>")).turns
    assert selection.stop_reason is StopReason.MALFORMED
    assert [hit.passage.id for hit in selection.steps[0].hits] == chosen


def test_in_place_of_writing_the_gold_answers_are_scored(make: Any) -> None:
    generator = make("never asked")
    _, answer = run(make(" [3] > [1] </record>"), generator, scores_answers=True).turns
    assert generator.prompts == []
    assert len(answer.log_likelihoods) == 1 and answer.log_likelihoods[0] < 0
    assert answer.answer_start == len(answer.token_ids)
    assert not answer.loss_mask.any()


def test_failures_of_the_infrastructure_end_the_episode_with_their_name(make: Any) -> None:
    def failing(error: Exception) -> Any:
        async def find(query: str, k: int) -> list[Hit]:
            raise error

        return find

    good = make(" [3] > [1] </record>")
    engine = run(good, make("", fails=True)).failure
    assert engine is not None and engine.stop_reason is StopReason.ENGINE_ERROR
    for error, reason in (
        (RetrieverUnavailable("no answer"), StopReason.RETRIEVER_UNAVAILABLE),
        (RetrieverError("an odd answer"), StopReason.RETRIEVER_BAD_ANSWER),
    ):
        retriever = run(good, make(""), find=failing(error)).failure
        assert retriever is not None and retriever.stop_reason is reason


@given(st.permutations(range(4)))
def test_what_is_named_is_what_was_chosen(tokenizer: Any, order: list[int]) -> None:
    text = tokenizer.decode(selection_ids(AGENT, tokenizer, order))
    assert named_passages(text, 4) == order
    assert named_passages(text, 2) == [i for i in order if i < 2]


def test_prompts_differ_in_what_is_asked_for_only(tokenizer: Any) -> None:
    select, answer = (f(AGENT, tokenizer, QUESTION, HITS[:2]) for f in (select_prompt, answer_prompt))
    shared = int(np.argmin([a == b for a, b in zip(select, answer, strict=False)] + [False]))
    assert tokenizer.decode(select[shared:]) in "<record>"
    assert tokenizer.decode(answer[shared:]) in "<answer>"
