"""Questions to a trained searcher: one that is watched step by step, or a file of them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ray.util.queue import Empty, Queue

from actors.cluster import Cluster
from actors.session import ray_session
from pipeline.core.agent_settings import settings_beside
from pipeline.core.agents.search import SEARCHER, Event, OnEvent
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.policies import PolicySpec
from pipeline.core.preflight import check_models
from pipeline.core.records import Question, Trajectory, step_as_json
from pipeline.core.retrieval import Searched, Servers, await_servers, searchable
from pipeline.core.run import Json, RunFiles
from pipeline.core.turns import TurnGrammar
from retriever_service.passages.evaluation import read_queries

PART = 256
"""Questions that are answered before the first of them is shown."""
POLL_S = 0.2
"""Longest that the last event is waited for, in seconds."""


def ask(
    question: str | None,
    questions: Path | None,
    model: str,
    index: Path | None,
    config: Config,
    display: Display,
    say: Callable[[str], None],
    *,
    json_lines: bool = False,
) -> None:
    """Answer one question, those of a file, or each line of standard input.

    Args:
        questions: a file (`read_queries`), in place of `question`.
        say: told lines for a person to read; with `json_lines` an object per question.

    Raises:
        UserError, RetrieverError: no such model, index or file, or no server that answers.
    """
    if question is not None and not question.strip():
        raise UserError("the question is empty; say what you want to know")
    if questions is not None:
        texts = read_queries(questions)
        with (
            open_searcher(model, index, config, display, at_once=None) as searcher,
            display.progress("answering", len(texts), "questions") as advance,
        ):
            answers = searcher.answers(texts, lambda done: advance.to(done, len(texts)))
            for id_, answer in zip(texts, answers, strict=True):
                say(
                    _in_json({"id": id_, **answer})
                    if json_lines
                    else f"{answer['question']}\n    {answer['answer']}"
                )
        return
    with open_searcher(model, index, config, display) as searcher:
        for text in [question] if question is not None else _lines(display):
            if json_lines:
                say(_in_json(searcher.watched(text)))
            else:
                searcher.watched(text, say)


def _lines(display: Display) -> Iterator[str]:
    """Of standard input, those that say something. A person is asked for each of them, and ends with Ctrl-D."""
    while True:
        if sys.stdin.isatty():
            display.line("Your question (Ctrl-D ends):")
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


@contextmanager
def open_searcher(
    model: str, index: Path | None, config: Config, display: Display, *, at_once: int | None = 1
) -> Iterator[OpenSearcher]:
    """A trained searcher, up until the block ends: its engine and retriever are started once for all questions.

    Args:
        index: None for the retriever of the configuration.
        config: its `agent` section says how to search; the model should have been trained with the same.
        at_once: questions in flight. None: as many as fit.

    Raises:
        UserError, RetrieverError: no such model, action or index, or no server that answers.
    """
    check_models([model])
    TurnGrammar(config.agent)  # whether its actions are there
    searched = what_to_search(index, config, display)
    spec = PolicySpec(
        SEARCHER,
        config.model.at(model),
        config.rollout.with_one(concurrency=at_once, enforce_eager=True),
    )
    # Nobody asks beside a single question: its searches need not wait for others.
    alone = {"batch_wait_s": 0.0} if at_once == 1 else {}
    retriever = config.retriever.model_copy(update={"replicas": 1, **alone})
    with ray_session(config.cluster, display.line):
        with display.status("starting the retriever and vLLM"):
            cluster = Cluster([spec], config.cluster, retriever, searched)
        with cluster:
            yield OpenSearcher(cluster, config)


class OpenSearcher:
    """What `open_searcher` gives: answers greedily, question after question.

    An answer is `{"question", "answer", "stop_reason", "steps": [{"query", "hits": [{"id", "title", "text", "score"}],
    "record", "selected", "action", "result"}]}`, as in `Step`.
    """

    def __init__(self, cluster: Cluster, config: Config) -> None:
        self._cluster, self._config = cluster, config

    def watched(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> Json:
        """One answer. `on_text` is told the trajectory while it unfolds, for people to read."""
        with _watching(lambda event: show(event, on_text)) as on_event:
            (answer,) = self._greedy(SearchProgram(self._config.agent, on_event=on_event), {"ask": question})
        return answer

    def answers(
        self, questions: Mapping[str, str], on_progress: Callable[[int], None] = lambda done: None
    ) -> Iterator[Json]:
        """One answer per question, in their order, as they come, in parts that keep the engine busy.

        Args:
            questions: text by id.
            on_progress: told how many have been answered.
        """
        items = list(questions.items())
        for first in range(0, len(items), PART):
            part = dict(items[first : first + PART])
            yield from self._greedy(SearchProgram(self._config.agent), part)
            on_progress(first + len(part))

    def _greedy(self, program: SearchProgram, questions: Mapping[str, str]) -> list[Json]:
        tasks = [Question(id_, text, ("",)) for id_, text in questions.items()]
        episodes = self._cluster.greedy(program, tasks, {SEARCHER: self._cluster.policy(SEARCHER)})
        return [
            as_json(task.text, episode.turn(SEARCHER)) for task, episode in zip(tasks, episodes, strict=True)
        ]


class _Relay:
    """Sends events from the worker where the program runs; picklable."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def __call__(self, event: Event) -> None:
        # It waits until the event is there: calls in flight have no order, and the driver would not wait for the last.
        self._queue.put_nowait(event)


@contextmanager
def _watching(on_event: OnEvent) -> Iterator[OnEvent]:
    """Has `on_event` called here for what is told to the relay, until the block has ended and nothing is left to
    tell."""
    queue, ended = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def tell() -> None:
        while True:
            try:
                on_event(queue.get(timeout=POLL_S))
            except Empty:
                if ended.is_set():
                    return

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield _Relay(queue)
    finally:
        ended.set()
        teller.join()
        queue.shutdown()


def what_to_search(index: Path | None, config: Config, display: Display) -> Searched:
    """An index, or the retriever of the configuration, once it is known to answer.

    Raises:
        UserError, RetrieverError: both are named, or neither is; no such index, or no server that answers.
    """
    retriever = config.retriever
    if index is not None and retriever.url is not None:
        raise UserError(
            f"there are --index {index} and retriever.url ({', '.join(retriever.url)}); leave one out "
            "(retriever.url=null)"
        )
    servers = await_servers(
        retriever, display, documents=config.agent.documents, timeout_s=config.cluster.start_timeout_s
    )
    searched = servers or index or retriever.index
    if searched is None:
        raise UserError("there is nothing to search: give --index DIR, or retriever.url=ADDRESS of a server")
    if isinstance(searched, Servers):
        return searched
    searchable(retriever, Path(searched))
    return Path(searched)


def settings_of(model: str) -> Path | None:
    """How a model was trained to search: the configuration of the run that its directory
    (RUN/iterations/N/POLICY/model) belongs to, or else `agent.json` beside it; None if neither is there.

    Raises:
        UserError: the run is of an earlier version, or `settings_beside`.
    """
    run = next(
        (parent.parent for parent in Path(model).resolve().parents if parent.name == "iterations"), None
    )
    if run is None or not (run / "config.yaml").is_file():
        return settings_beside(model)
    RunFiles(run).check_layout()
    return run / "config.yaml"


def show(event: Event, on_text: Callable[[str], None]) -> None:
    """One event of a trajectory in words."""
    if event.kind == "search":
        for rank, hit in enumerate(event.hits, start=1):
            on_text(f"    [{rank}] {hit.score:.2f}  {hit.passage.title}: {hit.passage.text}")
    elif event.kind == "stop":
        if event.text != "answered":
            on_text(f"stopped: {event.text}")
    else:
        on_text(f"{event.kind:>7}  {event.text}")


def _in_json(answer: Json) -> str:
    return json.dumps(answer, ensure_ascii=False)


def as_json(question: str, trajectory: Trajectory) -> Json:
    """A trajectory for programs."""
    return {
        "question": question,
        "answer": trajectory.answer,
        "stop_reason": trajectory.stop_reason.value,
        "steps": [step_as_json(step) for step in trajectory.steps],
    }
