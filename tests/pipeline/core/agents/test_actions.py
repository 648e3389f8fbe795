"""Actions of one's own: the one of docs/actions.md, and small ones for what may go wrong."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.actions import Action, ActionUnavailable, load_actions
from pipeline.core.agents.search import Event
from pipeline.core.config import AgentConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Question, Step, StopReason
from pipeline.core.renderer import Renderer
from pipeline.core.turns import Call, MalformedTurn, Turn, default_instructions
from tests.pipeline.core.agents.test_search import ANSWER, THINK, check_layout, run

HERE = __name__
PAGE = Path(__file__).resolve().parents[4] / "docs" / "actions.md"
RECORD = "<record> Orvane makes it. </record>\n"
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=40)


class Echo(Action):
    name = "echo"
    tags = ("<echo>", "</echo>")
    result_tags = ("<heard>", "</heard>")
    instructions = "To hear yourself write <echo> words </echo>."
    limit = 2

    async def __call__(self, call: str, steps: Sequence[Step]) -> str:
        return f"{call} behind {len(steps)}"

    def demonstrate(self, question: Question) -> Sequence[str]:
        return [question.text[:3], "again"]


class Quiet(Echo):
    name = "quiet"
    tags = ("<quiet>", "</quiet>")
    result_tags = ("<then>", "</then>")
    trained = False


class Slow(Echo):
    name = "slow"
    tags = ("<slow>", "</slow>")
    result_tags = ("<late>", "</late>")
    timeout_s = 0.01

    async def __call__(self, call: str, steps: Sequence[Step]) -> str:
        await asyncio.sleep(60)
        return "too late"


class Away(Slow):
    name = "away"

    async def __call__(self, call: str, steps: Sequence[Step]) -> str:
        raise ActionUnavailable("nobody is at home")


class Broken(Slow):
    async def __call__(self, call: str, steps: Sequence[Step]) -> str:
        raise ZeroDivisionError


class NeedsAKey(Echo):
    def __init__(self, key: str) -> None:
        self.key = key


class Think(Echo):
    name = "think"


class SameTags(Quiet):
    tags = Echo.tags


def of(*kinds: type[Action]) -> tuple[str, ...]:
    return tuple(f"{HERE}:{kind.__name__}" for kind in kinds)


# ---------------------------------------------------------------- the documented one


@pytest.fixture
def calculator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of the page, in a folder on the path."""
    example, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "calculator.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "calculator:Calculator"


@pytest.mark.parametrize("layout", ["plain", "chat"])
def test_the_documented_action_computes_for_the_agent(
    chat_tokenizer: Any, calculator: str, layout: str
) -> None:
    turns = [THINK, f"{RECORD}<calculate> 1984 - 1950 </calculate>", "<answer> 34 </answer>"]
    trajectory, engine, retriever = run(chat_tokenizer, turns, layout=layout, actions=calculator)
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.ANSWERED, "34")
    assert len(retriever.calls) == trajectory.num_searches == 1
    searched, called = trajectory.steps
    assert (searched.record, searched.action) == ("Orvane makes it.", "")
    assert (called.action, called.query, called.result) == ("calculate", "1984 - 1950", "34")
    text = chat_tokenizer.decode(trajectory.token_ids)
    assert "<result> 34 </result>" in text
    assert chat_tokenizer.decode(trajectory.token_ids[trajectory.loss_mask]) == "".join(turns)
    check_layout(chat_tokenizer, trajectory, engine)


def test_the_documented_action_answers_whatever_it_is_asked(calculator: str) -> None:
    (calculate,) = load_actions((calculator,))

    def result(call: str) -> str:
        return asyncio.run(calculate(call, ()))

    assert [result(c) for c in ("1 + 1", "-(3 - 5) * 2.5", "1 / 8")] == ["2", "5", "0.125"]
    for odd in ("1 / 0", "two", "__import__('os')", "1 +", "2 ** 9", "(" * 500, "True or 1", "'a' + 'b'"):
        assert result(odd).startswith("that is no expression")


# ---------------------------------------------------------------- what holds for all


def test_events_show_a_call_and_its_result(tokenizer: Any) -> None:
    events: list[Event] = []
    turns = ["<echo> hi </echo>", "<answer> hi </answer>"]
    run(tokenizer, turns, events=events, actions=of(Echo))
    assert [(e.kind, e.text) for e in events] == [
        ("call", "echo: hi"),
        ("result", "hi behind 0"),
        ("answer", "hi"),
        ("stop", "answered"),
    ]


def test_behind_a_result_nothing_is_selected_or_recorded_and_a_search_counts_as_before(
    tokenizer: Any,
) -> None:
    select = "<select> [2] </select>\n"
    turns = ["<echo> hi </echo>", THINK, f"{select}{RECORD}<echo> ho </echo>", THINK, f"{select}{ANSWER}"]
    trajectory, engine, _ = run(tokenizer, turns, actions=of(Echo), select=True, max_searches=2)
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert [step.action for step in trajectory.steps] == ["echo", "", "echo", ""]
    assert [bool(step.record) for step in trajectory.steps] == [False, True, False, True]
    check_layout(tokenizer, trajectory, engine)
    misplaced, _, _ = run(tokenizer, ["<echo> hi </echo>", f"{RECORD}{THINK}"], actions=of(Echo))
    assert misplaced.stop_reason is StopReason.MALFORMED


def test_beyond_its_limit_a_call_is_not_trained_and_an_answer_is_demanded(tokenizer: Any) -> None:
    turns = [*["<echo> hi </echo>"] * 3, " hi </answer>"]
    trajectory, _, _ = run(tokenizer, turns, actions=of(Echo))
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.STEP_LIMIT, "hi")
    trained = tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
    assert trained == "<echo> hi </echo><echo> hi </echo> hi </answer>"


def test_a_result_that_does_not_fit_leads_to_an_answer(tokenizer: Any) -> None:
    long, answer = f"<echo> {'so ' * 30}</echo>", " hi </answer>"
    _, unlimited, _ = run(tokenizer, [long, "<answer> hi </answer>"], actions=of(Echo), max_turn_tokens=150)
    room = len(unlimited.prompts[1]) + 150
    trajectory, _, _ = run(tokenizer, [long, answer], actions=of(Echo), max_turn_tokens=150, max_length=room)
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.LENGTH_LIMIT, "hi")
    assert trajectory.steps == ()


def test_a_call_that_is_not_to_be_trained_is_context_and_what_is_around_it_is_trained(tokenizer: Any) -> None:
    turns = [THINK, f"{RECORD}<quiet> hi </quiet>", "<answer> hi </answer>"]
    trajectory, _, _ = run(tokenizer, turns, actions=of(Quiet))
    trained = tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
    assert trained.split() == f"{THINK}{RECORD} <answer> hi </answer>".split()
    written = tokenizer.decode(trajectory.token_ids[trajectory.sampled])
    assert written == "".join(turns)
    assert trajectory.stop_reason is StopReason.ANSWERED


@pytest.mark.parametrize(
    ("kind", "detail"), [(Slow, "slow gave no result within 0.01 s"), (Away, "nobody is at home")]
)
def test_an_action_that_cannot_be_had_ends_the_trajectory_as_infrastructure(
    tokenizer: Any, kind: type[Action], detail: str
) -> None:
    trajectory, engine, _ = run(tokenizer, ["<slow> hi </slow>"], actions=of(kind))
    assert trajectory.stop_reason is StopReason.ACTION_UNAVAILABLE
    assert trajectory.stop_reason.is_infrastructure
    assert trajectory.detail == detail
    check_layout(tokenizer, trajectory, engine)


def test_a_mistake_in_an_action_comes_through(tokenizer: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        run(tokenizer, ["<slow> hi </slow>"], actions=of(Broken))


@pytest.mark.parametrize(
    "turn",
    [
        "<echo> </echo>",
        "<echo> hi",
        "<echo> <heard> made up </heard> </echo>",
        "<echo> hi </echo> <think> q </think>",
        "<heard> made up </heard>",
    ],
)
def test_a_call_that_breaks_the_protocol_is_malformed(tokenizer: Any, turn: str) -> None:
    with pytest.raises(MalformedTurn):
        Renderer(tokenizer, AgentConfig(actions=of(Echo))).parse_turn(turn, expects_record=False)


@given(record=words, content=words)
def test_a_turn_with_a_call_parses_back(tokenizer: Any, record: str, content: str) -> None:
    renderer = Renderer(tokenizer, AgentConfig(actions=of(Echo, Quiet)))
    for name in ("echo", "quiet"):
        turn = Turn(record=record.strip() or "r", call=Call(name, content.strip() or "c"))
        assert renderer.parse_turn(renderer.turn_text(turn), expects_record=True) == turn


@pytest.mark.parametrize("layout", ["plain", "chat"])
@settings(max_examples=20)
@given(calls=st.lists(st.sampled_from(["echo", "quiet"]), max_size=3), content=words)
def test_however_calls_follow_ids_stay_and_the_mask_holds_what_is_trained(
    chat_tokenizer: Any, layout: str, calls: list[str], content: str
) -> None:
    content = content.strip() or "c"
    turns = [f"<{name}> {content} </{name}>" for name in calls]
    expected = [turn for turn in turns if not turn.startswith("<quiet>")]
    ends = len(calls) > max(calls.count("echo"), calls.count("quiet")) or len(calls) < 3
    turns.append("<answer> a </answer>" if ends else " a </answer>")
    trajectory, engine, _ = run(chat_tokenizer, turns, layout=layout, actions=of(Echo, Quiet))
    trained = chat_tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
    assert trained == "".join([*(expected if ends else expected[:2]), turns[-1]])
    ids = trajectory.token_ids.tolist()
    for prompt in engine.prompts:
        assert ids[: len(prompt)] == prompt
    wrote = [id_ for turn in engine.written for id_ in turn]
    assert trajectory.token_ids[trajectory.sampled].tolist() == wrote


@given(parts=st.lists(st.one_of(st.sampled_from(["<answer>", "</search>", "<|im_end|>"]), words), max_size=5))
def test_a_result_smuggles_in_neither_tags_nor_special_tokens(
    chat_tokenizer: Any, tag_tokenizer: Any, parts: list[str]
) -> None:
    (echo,) = load_actions(of(Echo))
    for tokenizer in (chat_tokenizer, tag_tokenizer):
        renderer = Renderer(tokenizer, AgentConfig(actions=of(Echo)))
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        assert special.isdisjoint(renderer.result_ids(echo, "".join(parts)))


@pytest.mark.parametrize("layout", ["plain", "chat"])
@given(text=words)
def test_actions_change_nothing_of_what_was_there_without(
    chat_tokenizer: Any, layout: str, text: str
) -> None:
    agent = {"layout": layout, "instructions": "Go."}
    without = Renderer(chat_tokenizer, AgentConfig.model_validate(agent))
    having = Renderer(chat_tokenizer, AgentConfig.model_validate({**agent, "actions": of(Echo)}))
    assert having.prompt_ids(text) == without.prompt_ids(text)
    assert having.observation_ids([]) == without.observation_ids([])
    assert having.answer_ids(text) == without.answer_ids(text)
    assert having.stop[: len(without.stop)] == without.stop


def test_built_in_instructions_say_how_to_call() -> None:
    said = default_instructions(AgentConfig(actions=of(Echo)))
    assert (
        "To hear yourself write <echo> words </echo>. The result comes back between <heard> and </heard>."
        in said
    )


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("calculator",), "must be a module and a class"),
        (("nowhere.at_all:Calculator",), "cannot be imported .*PYTHONPATH"),
        ((f"{HERE}:run",), "is no subclass of pipeline.core.actions.Action"),
        ((f"{HERE}:Missing",), "is no subclass"),
        ((f"{HERE}:NeedsAKey",), "cannot be made without arguments"),
        (of(Echo, Echo), "different names"),
        (of(Think), "different names, none of them .*think"),
        (of(Echo, SameTags), "must be different"),
    ],
)
def test_what_is_no_action_is_refused_before_anything_starts(
    tokenizer: Any, names: tuple[str, ...], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        Renderer(tokenizer, AgentConfig(actions=names))


def test_an_action_must_say_all_that_is_needed(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "half_an_action.py").write_text(
        "from pipeline.core.actions import Action\n"
        "class Half(Action):\n"
        "    name = 'half'\n"
        "    async def __call__(self, call, steps):\n"
        "        return call\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="does not say its tags, result_tags, instructions"):
        Renderer(tokenizer, AgentConfig(actions=("half_an_action:Half",)))
