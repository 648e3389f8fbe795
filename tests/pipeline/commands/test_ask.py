"""What `exsearch ask` shows of a trajectory, and when."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from pipeline.commands import ask as module
from pipeline.commands.ask import _watching, as_json, open_searcher, show
from pipeline.core.agents.search import Event, OnEvent
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.records import Step, StopReason, Trajectory
from pipeline.core.run import Json
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

MODEL = Path(__file__).resolve().parents[3] / "models" / "tiny-searcher"
HIT = Hit(Passage("p7", "Orvane", "Mara Velin founded Orvane."), 0.75)


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        (Event("think", "who founded it?"), ["  think  who founded it?"]),
        (Event("search", "", (HIT,)), ["    [1] 0.75  Orvane: Mara Velin founded Orvane."]),
        (Event("search", "nothing is found"), []),
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


def test_a_trajectory_for_programs_has_its_steps_with_their_passages() -> None:
    empty = np.zeros(0, dtype=np.float32)
    trajectory = Trajectory(
        question_id="ask",
        sample=0,
        policy_version=0,
        token_ids=empty.astype(np.int32),
        loss_mask=empty.astype(np.bool_),
        logprobs=empty,
        answer_start=0,
        steps=(Step("who founded it?", (HIT,), "Mara did", (0,)),),
        answer="Mara Velin",
        stop_reason=StopReason.ANSWERED,
    )
    passage = {"id": "p7", "title": "Orvane", "text": "Mara Velin founded Orvane.", "score": 0.75}
    others = {"selected": [0], "action": "", "result": ""}
    assert as_json("Who?", trajectory) == {
        "question": "Who?",
        "answer": "Mara Velin",
        "stop_reason": "answered",
        "steps": [{"query": "who founded it?", "hits": [passage], "record": "Mara did", **others}],
    }


class Searcher:
    """Answers every question with its own text."""

    opened = 0

    @contextmanager
    def open(self, *arguments: Any, at_once: int | None = 1) -> Iterator[Searcher]:
        self.opened += 1
        yield self

    def watched(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> Json:
        on_text(f" answer  {question}")
        return {"question": question, "answer": question}

    def answers(self, questions: Mapping[str, str], on_progress: Callable[[int], None]) -> Iterator[Json]:
        return (self.watched(text) for text in questions.values())


@pytest.fixture
def searcher(monkeypatch: pytest.MonkeyPatch) -> Searcher:
    searcher = Searcher()
    monkeypatch.setattr(module, "open_searcher", searcher.open)
    return searcher


def asked(question: str | None = None, questions: Path | None = None, **options: bool) -> list[str]:
    said: list[str] = []
    module.ask(question, questions, "model", None, Config(), Display(), said.append, **options)
    return said


def test_each_line_of_standard_input_is_a_question_to_one_searcher(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\n  Where? \n"))
    assert asked() == [" answer  Who?", " answer  Where?"]
    assert searcher.opened == 1


def test_a_file_of_questions_is_answered_in_its_order(searcher: Searcher, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "b", "question": "Who?"}\n{"id": "a", "question": "Where?"}\n')

    assert asked(questions=path) == ["Who?\n    Who?", "Where?\n    Where?"]
    found = [json.loads(line) for line in asked(questions=path, json_lines=True)]
    assert [(answer["id"], answer["answer"]) for answer in found] == [("b", "Who?"), ("a", "Where?")]


def test_nothing_starts_for_an_empty_question_or_a_file_that_is_none(
    searcher: Searcher, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the question is empty"):
        asked(" ")
    with pytest.raises(RetrieverError, match=r"missing\.jsonl"):
        asked(questions=tmp_path / "missing.jsonl")
    assert searcher.opened == 0


@pytest.fixture
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.component
@pytest.mark.usefixtures("ray_session")
def test_events_arrive_in_their_order_while_the_program_still_runs_and_none_is_lost_at_its_end() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        """Says things from an event loop, as a rollout worker does."""

        async def say(self, watcher: OnEvent, *texts: str) -> None:
            for text in texts:
                watcher(Event("think", text))

    heard: SimpleQueue[Event] = SimpleQueue()
    worker = Worker.remote()
    many = [str(number) for number in range(50)]
    with _watching(heard.put) as watcher:
        ray.get(worker.say.remote(watcher, "first"))
        # The block has not ended, and what was said is here.
        assert heard.get(timeout=60).text == "first"
        ray.get(worker.say.remote(watcher, *many))
    assert [heard.get_nowait().text for _ in many] == many


def test_an_action_that_is_not_there_is_missed_before_anything_starts() -> None:
    config = Config.model_validate({"agent": {"actions": "nowhere.at_all:Calculator"}})
    with (
        pytest.raises(UserError, match=r"agent\.actions: nowhere\.at_all:Calculator cannot be imported"),
        open_searcher(str(MODEL), None, config, Display()),
    ):
        pass
