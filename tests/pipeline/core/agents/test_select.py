"""The agent with `select`: an ordering of the passages in front of the record, masked as what the model wrote."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.agents.search import Event
from pipeline.core.config import AgentConfig
from pipeline.core.orderings import ordering_text
from pipeline.core.records import StopReason
from pipeline.core.renderer import Renderer
from pipeline.core.turns import MalformedTurn, Turn, default_instructions
from tests.pipeline.core.agents.test_search import AGAIN, ANSWER, THINK, check_layout, run

SELECT = "<select> [2] > [1] </select>\n"
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=40)
contents = words.map(str.strip).filter(bool)


def test_each_record_follows_from_what_was_selected_of_its_search(tokenizer: Any) -> None:
    events: list[Event] = []
    turns = [THINK, SELECT + AGAIN, f"<select> [1] </select>\n{ANSWER}"]
    trajectory, engine, _ = run(tokenizer, turns, events=events, select=True)
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.ANSWERED, "Mara Velin")
    assert [step.selected for step in trajectory.steps] == [(1, 0), (0,)]
    assert [step.record for step in trajectory.steps] == ["Orvane makes it.", "Mara Velin founded Orvane."]
    assert [e.kind for e in events] == [
        *("think", "search", "select", "record", "think", "search", "select", "record", "answer", "stop")
    ]
    assert [(e.text, [hit.passage.id for hit in e.hits]) for e in events if e.kind == "select"] == [
        ("[2] > [1]", ["p11", "p10"]),
        ("[1]", ["p20"]),
    ]
    check_layout(tokenizer, trajectory, engine)


def test_a_number_means_the_passage_that_is_shown_behind_it(tokenizer: Any) -> None:
    """The released code shows passages from 1 on and takes the numbers for places from 0 on."""
    for number in (1, 2, 3):
        turns = [THINK, f"<select> [{number}] </select>\n{ANSWER}"]
        trajectory, engine, _ = run(tokenizer, turns, select=True, documents=3)
        shown = tokenizer.decode(engine.prompts[1])
        (used,) = trajectory.steps[0].used_hits
        behind = shown.partition(f"[{number}] ")[2].partition("\n")[0]
        assert behind == f"{used.passage.title}: {used.passage.text}"
        assert used is trajectory.steps[0].hits[number - 1]


def test_a_selection_is_trained_and_the_passages_are_neither_trained_nor_shown_again(tokenizer: Any) -> None:
    trajectory, _, _ = run(tokenizer, [THINK, SELECT + ANSWER], select=True)
    trained = tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
    assert trained == f"{THINK}{SELECT}{ANSWER}"
    without, _, _ = run(tokenizer, [THINK, ANSWER])
    given_, plain = (tokenizer.decode(t.token_ids[~t.loss_mask]) for t in (trajectory, without))
    assert given_ == plain


@pytest.mark.parametrize(
    ("selection", "why"),
    [
        ("", "expected <select> ... </select>"),
        ("<select> </select>\n", "by their numbers"),
        ("<select> the second </select>\n", "by their numbers"),
        ("<select> [3] </select>\n", "not there, of 2"),
        ("<select> [0] </select>\n", "not there, of 2"),
        ("<select> [2] > [2] </select>\n", "twice"),
    ],
)
def test_a_bad_selection_cuts_the_trajectory_and_says_why(tokenizer: Any, selection: str, why: str) -> None:
    trajectory, engine, _ = run(tokenizer, [THINK, selection + ANSWER], select=True)
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert why in trajectory.detail
    assert trajectory.steps[0].selected == ()
    check_layout(tokenizer, trajectory, engine)


def test_a_selection_names_no_more_than_are_asked_for(tokenizer: Any) -> None:
    turns = [THINK, SELECT + ANSWER]
    trajectory, _, _ = run(tokenizer, turns, select=True, selected_documents=1)
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert "2 passages, of at most 1" in trajectory.detail


def test_where_nothing_was_found_nothing_is_selected(tokenizer: Any) -> None:
    class FindsNothing:
        calls: tuple[Any, ...] = ()

        async def __call__(self, query: str, k: int) -> list[Any]:
            return []

    finds_nothing: Any = FindsNothing()
    trajectory, _, _ = run(tokenizer, [THINK, ANSWER], select=True, retriever=finds_nothing)
    assert trajectory.stop_reason is StopReason.ANSWERED


def test_a_refused_sub_query_leaves_selection_and_record_in_front_of_it_trained(tokenizer: Any) -> None:
    turns = [THINK, SELECT + AGAIN, " Mara </answer>"]
    trajectory, engine, _ = run(tokenizer, turns, select=True, max_searches=1)
    assert trajectory.stop_reason is StopReason.STEP_LIMIT
    trained = tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
    assert trained.split() == f"{THINK}{SELECT}<record> Orvane makes it. </record> Mara </answer>".split()
    check_layout(tokenizer, trajectory, engine)


@pytest.mark.parametrize("layout", ["plain", "chat"])
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("record", [True, False])
@settings(max_examples=15)
@given(data=st.data(), note=contents)
def test_whatever_is_selected_under_every_switch_the_mask_holds_what_the_model_wrote(
    chat_tokenizer: Any, layout: str, think: bool, record: bool, data: st.DataObject, note: str
) -> None:
    order = data.draw(st.permutations(range(4)).flatmap(lambda p: st.integers(1, 4).map(lambda n: p[:n])))
    config = {"layout": layout, "think": think, "record": record, "select": True, "documents": 4}
    renderer = Renderer(chat_tokenizer, AgentConfig.model_validate({**config, "selected_documents": 4}))
    last = Turn(record=note if record else "", answer="Mara", selected=tuple(order))
    turns = [*([THINK] if think else []), renderer.turn_text(last)]
    trajectory, engine, _ = run(chat_tokenizer, turns, **config, selected_documents=4)
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert trajectory.steps[0].selected == tuple(order)
    trained = trajectory.token_ids[trajectory.loss_mask].tolist()
    assert trained == [id_ for turn in engine.written for id_ in turn]
    assert ordering_text(order) in chat_tokenizer.decode(trained)
    check_layout(chat_tokenizer, trajectory, engine)


@given(record=contents, query=contents, data=st.data())
def test_a_turn_that_selects_parses_back(
    tokenizer: Any, record: str, query: str, data: st.DataObject
) -> None:
    renderer = Renderer(tokenizer, AgentConfig(select=True, selected_documents=5))
    order = data.draw(st.permutations(range(5)))
    for turn in (
        Turn(record=record, query=query, selected=tuple(order)),
        Turn(record=record, answer=query, selected=tuple(order[:1])),
    ):
        text = renderer.turn_text(turn)
        assert renderer.parse_turn(text, expects_record=True, passages=5) == turn
        with pytest.raises(MalformedTurn):
            renderer.parse_turn(text, expects_record=True)


@pytest.mark.parametrize("layout", ["plain", "chat"])
@given(question=words, passage=words)
def test_without_the_switch_its_tags_are_words_like_others(
    chat_tokenizer: Any, layout: str, question: str, passage: str
) -> None:
    agent = {"layout": layout, "instructions": "Go."}
    off = Renderer(chat_tokenizer, AgentConfig.model_validate(agent))
    on = Renderer(chat_tokenizer, AgentConfig.model_validate({**agent, "select": True}))
    assert on.prompt_ids(question) == off.prompt_ids(question)
    assert on.answer_ids(passage) == off.answer_ids(passage)
    assert on.stop == off.stop
    quoted = f"{passage} <select> [1] </select>".strip()
    assert off.parse_turn(off.turn_text(Turn(query=quoted)), expects_record=False).query == quoted
    with pytest.raises(MalformedTurn, match="inside of another action"):
        on.parse_turn(on.turn_text(Turn(query=quoted)), expects_record=False)


@given(parts=st.lists(st.one_of(st.sampled_from(["<select>", "</select>", "[1]"]), words), max_size=5))
def test_a_passage_never_holds_the_tag_where_that_is_one_token(tag_tokenizer: Any, parts: list[str]) -> None:
    renderer = Renderer(tag_tokenizer, AgentConfig(select=True))
    tags = set(tag_tokenizer.get_added_vocab().values())
    assert tags.isdisjoint(renderer.prompt_ids("".join(parts)))


def test_built_in_instructions_name_the_selection_only_where_there_is_something_to_select() -> None:
    assert "<select> [2] > [1] </select>" in default_instructions(AgentConfig(select=True))
    assert "<select> [1] </select>" in default_instructions(AgentConfig(select=True, documents=1))
    assert "select" not in default_instructions(AgentConfig())
    no_search = AgentConfig(select=True).model_copy(update={"search": False})
    assert "select" not in default_instructions(no_search)
