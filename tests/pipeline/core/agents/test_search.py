"""The agent as a state machine. The engine says scripted turns and remembers the requests; no real parts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.agents.program import Completion, EngineError, Sampling, derive_seed
from pipeline.core.agents.search import Event, SearchAgent
from pipeline.core.config import AgentConfig
from pipeline.core.records import Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

QUESTION = Question(id="q1", text="Who founded the maker of the Silver Harp?", answers=("Mara Velin",))
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=0, seed=7, stop=())
THINK = "<think> Who makes the Silver Harp? </think>"
AGAIN = "<record> Orvane makes it. </record>\n<think> Who founded Orvane? </think>"
ANSWER = "<record> Mara Velin founded Orvane. </record>\n<answer> Mara Velin </answer>"


class ScriptedEngine:
    """Says one turn after the other, cut at `max_tokens`; an exception in the script is raised."""

    def __init__(self, tokenizer: Any, turns: Sequence[str | Exception]) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.written: list[list[int]] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        ids = self.tokenizer(turn, add_special_tokens=False)["input_ids"][: sampling.max_tokens]
        self.written.append(ids)
        text = self.tokenizer.decode(ids)
        stop = next((s for s in sampling.stop if text.endswith(s)), None)
        reason = "stop" if stop else "eos" if text == turn else "length"
        return Completion(ids, [-0.5] * len(ids), text, stop, reason)  # type: ignore[arg-type]


class RecordingRetriever:
    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[str, int]] = []

    async def __call__(self, query: str, k: int) -> list[Hit]:
        self.calls.append((query, k))
        if self.failure:
            raise self.failure
        return [Hit(Passage(f"p{len(self.calls)}{i}", "Title", f"About {query}"), 1.0 - i) for i in range(k)]


def run(
    tokenizer: Any,
    turns: Sequence[str | Exception],
    *,
    retriever: RecordingRetriever | None = None,
    max_length: int = 4096,
    events: list[Event] | None = None,
    keeps_mistakes: bool = False,
    **config: Any,
) -> tuple[Trajectory, ScriptedEngine, RecordingRetriever]:
    engine, retriever = ScriptedEngine(tokenizer, turns), retriever or RecordingRetriever()
    renderer = Renderer(tokenizer, AgentConfig(**{"documents": 2, **config}))
    agent = SearchAgent(renderer, engine, retriever, max_length=max_length, keeps_mistakes=keeps_mistakes)
    on_event = (lambda event: None) if events is None else events.append
    trajectory = asyncio.run(
        agent.run(QUESTION, sampling=SAMPLING, sample=2, policy_version=5, on_event=on_event)
    )
    return trajectory, engine, retriever


def check_layout(tokenizer: Any, trajectory: Trajectory, engine: ScriptedEngine) -> None:
    """What holds for every trajectory, however it ended."""
    ids, mask = trajectory.token_ids.tolist(), trajectory.loss_mask
    for prompt in engine.prompts:
        assert ids[: len(prompt)] == prompt[: len(ids)]
    sampled = trajectory.sampled
    assert not np.isnan(trajectory.logprobs[mask]).any()
    # The model's tokens are what it wrote, to the token; only a last turn that went wrong may be missing.
    wrote = [list(chain.from_iterable(turns)) for turns in (engine.written, engine.written[:-1])]
    assert trajectory.token_ids[sampled].tolist() in wrote
    # Only a sub-query that was refused was written by the model and is not trained.
    refused = tokenizer.decode(trajectory.token_ids[sampled & ~mask])
    assert refused == "" or refused.strip().startswith("<think>")
    assert tokenizer.decode(trajectory.answer_context).endswith("<answer>") or (
        trajectory.stop_reason.is_infrastructure and trajectory.answer_start == len(ids)
    )


def test_two_searches_and_an_answer(tokenizer: Any) -> None:
    events: list[Event] = []
    trajectory, engine, retriever = run(tokenizer, [THINK, AGAIN, ANSWER], events=events)
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert trajectory.answer == "Mara Velin"
    assert retriever.calls == [("Who makes the Silver Harp?", 2), ("Who founded Orvane?", 2)]
    assert [(s.query, s.record) for s in trajectory.steps] == [
        ("Who makes the Silver Harp?", "Orvane makes it."),
        ("Who founded Orvane?", "Mara Velin founded Orvane."),
    ]
    assert [hit.passage.id for hit in trajectory.steps[1].hits] == ["p20", "p21"]
    assert (trajectory.question_id, trajectory.sample, trajectory.policy_version) == ("q1", 2, 5)
    assert [e.kind for e in events] == [
        *("think", "search", "record", "think", "search", "record", "answer", "stop")
    ]
    assert tokenizer.decode(trajectory.token_ids[trajectory.answer_start :]) == " Mara Velin </answer>"
    check_layout(tokenizer, trajectory, engine)


def test_the_environment_is_masked_and_the_models_words_are_kept_to_the_token(tokenizer: Any) -> None:
    trajectory, engine, _ = run(tokenizer, [THINK, AGAIN, ANSWER])
    assert sum(map(len, engine.written)) == trajectory.loss_mask.sum()
    written = [i for ids in engine.written for i in ids]
    assert trajectory.token_ids[trajectory.loss_mask].tolist() == written
    assert set(trajectory.logprobs[trajectory.loss_mask].tolist()) == {-0.5}
    masked = tokenizer.decode(trajectory.token_ids[~trajectory.loss_mask])
    assert "About Who founded Orvane?" in masked
    assert "Orvane makes it" not in masked


def test_every_turn_has_its_own_seed_and_the_same_run_has_the_same_seeds(tokenizer: Any) -> None:
    _, first, _ = run(tokenizer, [THINK, AGAIN, ANSWER])
    _, second, _ = run(tokenizer, [THINK, AGAIN, ANSWER])
    seeds = [sampling.seed for sampling in first.samplings]
    assert len(set(seeds)) == 3
    assert seeds == [sampling.seed for sampling in second.samplings]


@given(parts=st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4))
def test_seeds_fit_into_63_bits_and_depend_on_every_part(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) == derive_seed(*parts)
    assert derive_seed(*parts) != derive_seed(*parts, 0)


# Every combination of the switches: the turns that a well-behaved model writes under it.
SWITCHES = [
    (True, True, True, [THINK, AGAIN, ANSWER], 2),
    (True, True, False, [THINK, "<think> q2 </think>", "<answer> Mara Velin </answer>"], 2),
    (True, False, True, [THINK, AGAIN, ANSWER], 0),
    (True, False, False, [THINK, "<answer> Mara Velin </answer>"], 0),
    (False, True, True, [ANSWER], 1),
    (False, True, False, ["<answer> Mara Velin </answer>"], 1),
    (False, False, True, [" Mara Velin </answer>"], 0),
    (False, False, False, [" Mara Velin </answer>"], 0),
]


@pytest.mark.parametrize("layout", ["plain", "chat"])
@pytest.mark.parametrize(("think", "search", "record", "turns", "searches"), SWITCHES)
def test_each_switch_takes_out_its_action_and_nothing_else(
    chat_tokenizer: Any, layout: str, think: bool, search: bool, record: bool, turns: list[str], searches: int
) -> None:
    trajectory, engine, retriever = run(
        chat_tokenizer, turns, layout=layout, think=think, search=search, record=record
    )
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.ANSWERED, "Mara Velin")
    assert len(retriever.calls) == trajectory.num_searches == searches
    text = chat_tokenizer.decode(trajectory.token_ids).partition(QUESTION.text)[2]
    assert ("<think>" in text) == think
    assert ("<search>" in text) == search
    assert ("<record>" in text) == (record and (think or search))
    check_layout(chat_tokenizer, trajectory, engine)


def test_without_thinking_the_question_itself_is_searched_once(tokenizer: Any) -> None:
    _, _, retriever = run(tokenizer, [ANSWER], think=False)
    assert retriever.calls == [(QUESTION.text, 2)]


def test_after_the_last_search_an_answer_is_demanded(tokenizer: Any) -> None:
    trajectory, engine, retriever = run(tokenizer, [THINK, AGAIN, " Mara </answer>"], max_searches=1)
    assert trajectory.stop_reason is StopReason.STEP_LIMIT
    assert trajectory.answer == "Mara"
    assert len(retriever.calls) == 1
    assert engine.samplings[-1].stop == ("</answer>",)
    text = tokenizer.decode(trajectory.token_ids)
    assert text.endswith("<think> Who founded Orvane? </think>\n<answer> Mara </answer>")
    opened = trajectory.answer_start
    assert not trajectory.loss_mask[opened - 1]
    assert trajectory.loss_mask[opened:].all()
    check_layout(tokenizer, trajectory, engine)


def test_a_sub_query_that_is_refused_is_not_trained_and_the_record_before_it_is(tokenizer: Any) -> None:
    at_limit, _, _ = run(tokenizer, [THINK, AGAIN, " Mara </answer>"], max_searches=1)
    _, unlimited, _ = run(tokenizer, [THINK, AGAIN, ANSWER])
    room = len(unlimited.prompts[2]) + 80
    no_room, _, _ = run(tokenizer, [THINK, AGAIN, " Mara </answer>"], max_length=room, max_turn_tokens=80)
    for trajectory in (at_limit, no_room):
        trained = tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
        assert trained.split() == f"{THINK}<record> Orvane makes it. </record> Mara </answer>".split()


@pytest.mark.parametrize(
    "turns",
    [
        ["I do not know."],
        [THINK, "<think> no record </think>"],
        [THINK, "<record> r </record> <search> [1] made up </search> <answer> a </answer>"],
        [THINK, AGAIN, "<record> r </record>"],
        ["<search> [1] made up"],
    ],
)
def test_a_malformed_turn_is_cut_off(tokenizer: Any, turns: list[str]) -> None:
    trajectory, engine, _ = run(tokenizer, turns)
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert trajectory.answer == ""
    assert trajectory.detail
    text = tokenizer.decode(trajectory.token_ids)
    assert "made up" not in text
    assert text.endswith("<answer>")
    assert trajectory.token_ids[trajectory.loss_mask].tolist() == [i for t in engine.written[:-1] for i in t]
    check_layout(tokenizer, trajectory, engine)


@pytest.mark.parametrize("layout", ["plain", "chat"])
@pytest.mark.parametrize(
    ("turns", "limits", "stop_reason"),
    [
        ([THINK, "<record> r </record> <answer> a"], {}, StopReason.MALFORMED),
        (["I do not know."], {}, StopReason.MALFORMED),
        ([THINK, "<record> " + "and " * 200], {"max_turn_tokens": 40}, StopReason.LENGTH_LIMIT),
        ([THINK, AGAIN, " Mara </answer>"], {"max_searches": 1}, StopReason.STEP_LIMIT),
    ],
)
def test_where_mistakes_are_kept_all_that_the_model_wrote_is_trained_and_an_answer_can_be_scored(
    chat_tokenizer: Any, layout: str, turns: list[str], limits: dict[str, int], stop_reason: StopReason
) -> None:
    trajectory, engine, _ = run(chat_tokenizer, turns, keeps_mistakes=True, layout=layout, **limits)
    assert trajectory.stop_reason is stop_reason
    written = [i for ids in engine.written for i in ids]
    assert trajectory.token_ids[trajectory.loss_mask].tolist() == written
    assert not np.isnan(trajectory.logprobs[trajectory.loss_mask]).any()
    assert chat_tokenizer.decode(trajectory.answer_context).endswith("<answer>")


def test_a_turn_that_does_not_end_is_cut_off_for_its_length(tokenizer: Any) -> None:
    trajectory, engine, _ = run(tokenizer, [THINK, "<record> " + "and " * 200], max_turn_tokens=40)
    assert trajectory.stop_reason is StopReason.LENGTH_LIMIT
    assert trajectory.answer == ""
    assert engine.samplings[0].max_tokens == 40
    check_layout(tokenizer, trajectory, engine)


def test_a_demanded_answer_that_does_not_close_is_no_answer(tokenizer: Any) -> None:
    cut, _, _ = run(tokenizer, ["so " * 200], think=False, search=False, max_turn_tokens=8)
    assert (cut.stop_reason, cut.answer) == (StopReason.LENGTH_LIMIT, "")
    ended, _, _ = run(tokenizer, [" Mara"], think=False, search=False)
    assert (ended.stop_reason, ended.answer) == (StopReason.MALFORMED, "")


@pytest.mark.parametrize("layout", ["plain", "chat"])
@settings(max_examples=40)
@given(
    max_length=st.integers(16, 700),
    max_turn_tokens=st.integers(4, 120),
    babble=st.booleans(),
    keeps=st.booleans(),
)
def test_no_trajectory_is_longer_than_the_context(
    chat_tokenizer: Any, layout: str, max_length: int, max_turn_tokens: int, babble: bool, keeps: bool
) -> None:
    turns = ["<think> " + "so " * 300] if babble else [THINK, AGAIN, AGAIN, AGAIN, " Mara Velin </answer>"]
    config = {"layout": layout, "instructions": "Go.", "max_searches": 3, "max_turn_tokens": max_turn_tokens}
    trajectory, engine, _ = run(chat_tokenizer, turns, max_length=max_length, **config)
    for prompt, sampling in zip(engine.prompts, engine.samplings, strict=True):
        assert len(prompt) + sampling.max_tokens <= max_length
    renderer = Renderer(chat_tokenizer, AgentConfig.model_validate(config))
    shortest = [*renderer.prompt_ids(QUESTION.text), *renderer.answer_demand_ids(at_turn_start=True)]
    if len(shortest) < max_length:
        assert len(trajectory.token_ids) <= max_length


def test_passages_that_do_not_fit_lead_to_an_answer_from_what_is_known(tokenizer: Any) -> None:
    _, unlimited, _ = run(tokenizer, [THINK, AGAIN, ANSWER])
    one_token_short = len(unlimited.prompts[2]) + 80
    turns = [THINK, AGAIN, " Mara </answer>"]
    trajectory, engine, _ = run(tokenizer, turns, max_length=one_token_short, max_turn_tokens=80)
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.LENGTH_LIMIT, "Mara")
    assert len(trajectory.steps) == 1
    check_layout(tokenizer, trajectory, engine)


def test_a_retriever_that_has_given_up_ends_the_trajectory_without_an_answer(tokenizer: Any) -> None:
    broken = RecordingRetriever(RetrieverUnavailable("no replica answered"))
    trajectory, engine, _ = run(tokenizer, [THINK], retriever=broken)
    assert trajectory.stop_reason is StopReason.RETRIEVER_UNAVAILABLE
    assert trajectory.stop_reason.is_infrastructure
    assert "no replica answered" in trajectory.detail
    assert trajectory.answer_start == len(trajectory.token_ids)
    check_layout(tokenizer, trajectory, engine)


def test_an_answer_of_the_retriever_that_makes_no_sense_costs_the_trajectory(tokenizer: Any) -> None:
    odd = RecordingRetriever(RetrieverError("a passage has neither title nor text"))
    trajectory, engine, _ = run(tokenizer, [THINK], retriever=odd)
    assert trajectory.stop_reason is StopReason.RETRIEVER_BAD_ANSWER
    assert trajectory.stop_reason.is_infrastructure
    assert trajectory.detail == "a passage has neither title nor text"
    check_layout(tokenizer, trajectory, engine)


@pytest.mark.parametrize("turns", [[EngineError("engine died")], [THINK, EngineError("engine died")]])
def test_an_engine_that_has_failed_ends_the_trajectory_without_an_answer(
    tokenizer: Any, turns: list[str | Exception]
) -> None:
    trajectory, engine, _ = run(tokenizer, turns)
    assert trajectory.stop_reason is StopReason.ENGINE_ERROR
    assert "engine died" in trajectory.detail
    assert trajectory.answer == ""
    check_layout(tokenizer, trajectory, engine)


def test_other_errors_are_bugs_and_come_through(tokenizer: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        run(tokenizer, [ZeroDivisionError()])


def test_agents_run_side_by_side_without_mixing(tokenizer: Any) -> None:
    async def many() -> list[Trajectory]:
        renderer, retriever = Renderer(tokenizer, AgentConfig(documents=2)), RecordingRetriever()
        engines = [
            ScriptedEngine(tokenizer, [f"<think> query {n} </think>", ANSWER.replace("Mara", str(n))])
            for n in range(20)
        ]
        agents = [SearchAgent(renderer, engine, retriever, max_length=4096) for engine in engines]
        return await asyncio.gather(*(agent.run(QUESTION, sampling=SAMPLING) for agent in agents))

    for n, trajectory in enumerate(asyncio.run(many())):
        assert trajectory.steps[0].query == f"query {n}"
        assert trajectory.answer == f"{n} Velin"


@pytest.mark.parametrize("answer", ['"Mara Velin"', "(1984)", "Mara"])
def test_another_answer_can_be_put_behind_the_tag_where_a_token_holds_its_end_and_more(
    crossing_tokenizer: Any, answer: str
) -> None:
    turns = [THINK, f"<record> r </record>\n<answer>{answer}</answer>"]
    trajectory, engine, _ = run(crossing_tokenizer, turns)
    assert trajectory.answer == answer
    check_layout(crossing_tokenizer, trajectory, engine)
    context = crossing_tokenizer.decode(trajectory.answer_context)
    assert context.endswith("<record> r </record>\n<answer>")
    example = Renderer(crossing_tokenizer, AgentConfig()).with_gold_answer(trajectory, "Ada", 0.0)
    assert crossing_tokenizer.decode(example.token_ids) == f"{context} Ada </answer>"
    # What the model did not write, the end of the tag, is not trained; the gold answer is.
    rest = crossing_tokenizer.decode(trajectory.answer_opening)
    assert rest == ("" if answer == "Mara" else ">")
    start, own = trajectory.answer_start, len(trajectory.answer_opening)
    assert example.loss_mask[:start].tolist() == trajectory.loss_mask[:start].tolist()
    assert example.loss_mask[start:].tolist() == [False] * own + [True] * (
        len(example.token_ids) - start - own
    )


@given(
    query=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=30),
    answer=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=30)
    | st.sampled_from(['"quoted"', "(é", "  \u0301"]),
)
@settings(max_examples=30)
def test_whatever_the_model_writes_ids_stay_and_decode_to_its_words(
    tokenizer: Any, tag_tokenizer: Any, crossing_tokenizer: Any, query: str, answer: str
) -> None:
    for some_tokenizer in (tokenizer, tag_tokenizer, crossing_tokenizer):
        turns = [f"<think>{query}</think>", f"<record>{query}</record>\n<answer>{answer}</answer>"]
        trajectory, engine, _ = run(some_tokenizer, turns)
        check_layout(some_tokenizer, trajectory, engine)
        own = some_tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
        assert own == ("".join(turns) if query.strip() else "")
        if query.strip():
            assert trajectory.answer == answer.strip()
            behind = some_tokenizer.decode(trajectory.token_ids[trajectory.answer_start :])
            assert behind == some_tokenizer.decode(trajectory.answer_opening) + f"{answer}</answer>"
