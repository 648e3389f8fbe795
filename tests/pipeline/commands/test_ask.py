"""What `exsearch ask` shows of a trajectory, and when; questions of a file and of a person."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands import ask as module
from pipeline.commands.ask import as_json, show
from pipeline.core.agents.program import Sampling
from pipeline.core.agents.search import Event, OnEvent
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.records import Step, StopReason, Trajectory
from retriever_service.errors import RetrieverError
from retriever_service.interrupts import interruptible
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

MODEL = Path(__file__).resolve().parents[3] / "models" / "tiny-searcher"
HIT = Hit(Passage("p7", "Orvane", "Mara Velin founded Orvane."), 0.75)


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        (Event("think", "who founded it?"), ["  think  who founded it?"]),
        (Event("search", "", (HIT,)), ["    [1] 0.75  Orvane: Mara Velin founded Orvane."]),
        (Event("search", "nothing is found"), ["    (nothing was found)"]),
        (Event("select", "[2] > [1]", (HIT, HIT)), [" select  [2] > [1]"]),
        (Event("record", "Mara did"), [" record  Mara did"]),
        (Event("call", "calculate: 1 + 1"), ["   call  calculate: 1 + 1"]),
        (Event("result", "2"), [" result  2"]),
        (Event("answer", "Mara Velin"), [" answer  Mara Velin"]),
        (Event("stop", "answered"), []),
        (Event("stop", "retriever_unavailable"), ["stopped: retriever_unavailable"]),
    ],
)
def test_each_event_is_said_in_words(event: Event, lines: list[str]) -> None:
    said: list[str] = []
    show(event, said.append)
    assert said == lines


def trajectory(answer: str, reason: StopReason, *steps: Step) -> Trajectory:
    empty = np.zeros(0, dtype=np.float32)
    return Trajectory(
        question_id="ask",
        sample=0,
        policy_version=0,
        token_ids=empty.astype(np.int32),
        loss_mask=empty.astype(np.bool_),
        logprobs=empty,
        answer_start=0,
        steps=steps,
        answer=answer,
        stop_reason=reason,
        detail="why it failed" if reason.is_infrastructure else "",
    )


def test_a_trajectory_for_programs_has_its_steps_with_their_passages() -> None:
    found = trajectory("Mara Velin", StopReason.ANSWERED, Step("who founded it?", (HIT,), "Mara did", (0,)))
    passage = {"id": "p7", "title": "Orvane", "text": "Mara Velin founded Orvane.", "score": 0.75}
    others = {"selected": [0], "action": "", "result": ""}
    assert as_json("Who?", found) == {
        "question": "Who?",
        "answer": "Mara Velin",
        "stop_reason": "answered",
        "steps": [{"query": "who founded it?", "hits": [passage], "record": "Mara did", **others}],
    }


class Agent:
    """In place of `actors.answering.AnsweringAgent`: answers each question with its own text, a slow one last.

    Args:
        fails: questions that infrastructure fails, with the reason.
    """

    def __init__(self, fails: Mapping[str, StopReason] | None = None) -> None:
        self.fails = fails or {}
        self.starts = self.in_flight = self.most_in_flight = self.answered = 0
        self.is_closed = False

    async def start(self) -> int:
        self.starts += 1
        return 2

    def check(self, question: str) -> None:
        if len(question) > 100:
            raise UserError("the question is too long")

    async def answer(self, question: str, sampling: Sampling, on_event: OnEvent) -> Trajectory:
        assert sampling.temperature == 0
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.2 if question == "Slow?" else 0.001)
        self.in_flight -= 1
        self.answered += 1
        reason = self.fails.get(question, StopReason.ANSWERED)
        if reason is StopReason.ANSWERED:
            on_event(Event("answer", question))
        on_event(Event("stop", reason.value))
        return trajectory("" if reason.is_infrastructure else question, reason)

    async def close(self) -> None:
        self.is_closed = True


def asked(
    agent: Agent, question: str | None = None, questions: Path | None = None, **options: bool
) -> list[str]:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "agent_of", lambda *arguments: agent)
        try:
            module.ask(question, questions, "model", None, Config(), Display(), said.append, **options)
        except RunError as error:
            said.append(f"error: {error}")
    assert agent.is_closed
    return said


def file_of(path: Path, *questions: str) -> Path:
    rows = ({"id": f"q{number}", "question": text} for number, text in enumerate(questions))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_line_of_standard_input_is_a_question_to_one_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\n  Where? \n"))
    agent = Agent()
    assert asked(agent) == ["Who?", " answer  Who?", "Where?", " answer  Where?"]
    assert agent.starts == 1


def test_a_file_of_questions_is_answered_in_its_order_by_as_many_at_once_as_fit(tmp_path: Path) -> None:
    texts = ["Slow?", *(f"{number}?" for number in range(20))]
    path = file_of(tmp_path / "questions.jsonl", *texts)

    agent = Agent()
    assert asked(agent, questions=path) == [f"{text}\n    {text}" for text in texts]
    assert agent.most_in_flight == 2
    found = [json.loads(line) for line in asked(Agent(), questions=path, json_lines=True)]
    assert [(one["id"], one["answer"]) for one in found] == [(f"q{n}", t) for n, t in enumerate(texts)]


def test_answers_of_a_file_are_said_as_they_come(tmp_path: Path) -> None:
    path = file_of(tmp_path / "questions.jsonl", *(f"{number}?" for number in range(100)))
    agent, answered = Agent(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "agent_of", lambda *arguments: agent)
        module.ask(None, path, "m", None, Config(), Display(), lambda line: answered.append(agent.answered))
    assert answered[0] < 20


def test_a_question_that_has_no_answer_says_why_and_the_others_have_theirs(tmp_path: Path) -> None:
    path = file_of(tmp_path / "questions.jsonl", "Who?", "Where?", "When?")
    fails = {"Where?": StopReason.RETRIEVER_UNAVAILABLE}

    first, second, third, error = asked(Agent(fails), questions=path)
    assert (first, third) == ("Who?\n    Who?", "When?\n    When?")
    assert second == "Where?\n    (no answer: retriever_unavailable: why it failed)"
    assert error.startswith("error: 1 of 3 questions have no answer") and "retriever_unavailable" in error
    found = json.loads(asked(Agent(fails), "Where?", json_lines=True)[0])
    assert (found["answer"], found["failure"]) == ("", "retriever_unavailable: why it failed")


def test_a_file_is_given_up_where_most_fail_and_at_once_where_the_engine_is_lost(tmp_path: Path) -> None:
    texts = [f"{number}?" for number in range(500)]
    path = file_of(tmp_path / "questions.jsonl", *texts)

    agent = Agent(dict.fromkeys(texts, StopReason.RETRIEVER_UNAVAILABLE))
    assert asked(agent, questions=path)[-1].startswith("error: 11 of 11 questions have no answer")
    assert agent.answered < 50
    agent = Agent({"3?": StopReason.ENGINE_ERROR})
    *answers, error = asked(agent, questions=path)
    assert len(answers) == 3 and error == "error: the engine was lost: why it failed"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_person_asks_on_behind_a_question_without_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Who?", "", "x" * 200, "Where?"])

    def typing(prompt: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typing)
    said = asked(Agent({"Who?": StopReason.RETRIEVER_UNAVAILABLE}))
    assert said == ["stopped: retriever_unavailable", " answer  Where?"]
    errors = capsys.readouterr().err
    assert "no answer: retriever_unavailable" in errors and "the question is too long" in errors


def test_nothing_starts_for_an_empty_question_or_a_file_that_is_none(tmp_path: Path) -> None:
    for question, questions, words in (
        (" ", None, "the question is empty"),
        (None, tmp_path / "missing.jsonl", r"missing\.jsonl"),
    ):
        with pytest.raises((UserError, RetrieverError), match=words):
            module.ask(question, questions, str(MODEL), None, Config(), Display(), print)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_start_that_is_interrupted_ends_with_the_exit_code_of_its_signal(
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Starting(Agent):
        async def start(self) -> int:
            signal.raise_signal(number)
            await asyncio.sleep(60)
            raise AssertionError("the signal did not end the start")

    monkeypatch.setattr(os, "_exit", sys.exit)
    with interruptible(), pytest.raises(SystemExit) as ended:
        asked(Starting(), "Who?")
    assert ended.value.code == code
    assert f"interrupted by {number.name}" in capsys.readouterr().err


def test_an_action_that_is_not_there_is_missed_before_anything_starts() -> None:
    config = Config.model_validate({"agent": {"actions": "nowhere.at_all:Calculator"}})
    with pytest.raises(UserError, match=r"agent\.actions: nowhere\.at_all:Calculator cannot be imported"):
        module.ask("Who?", None, str(MODEL), None, config, Display(), print)
