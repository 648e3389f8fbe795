"""One question to a trained searcher, watched step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.util.queue import Empty, Queue

from actors.cluster import Cluster
from actors.session import ray_session
from pipeline.core.agents.search import SEARCHER, Event, OnEvent
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.policies import PolicySpec
from pipeline.core.preflight import check_models
from pipeline.core.records import Question, Trajectory
from pipeline.core.retrieval import Searched, Servers, await_servers
from pipeline.core.run import Json, RunFiles
from retriever_service.index.store import read_manifest

POLL_S = 0.2
"""Longest that the last event is waited for, in seconds."""


def ask(
    question: str,
    model: str,
    index: Path | None,
    config: Config,
    display: Display,
    on_text: Callable[[str], None] = lambda text: None,
) -> Json:
    """Answer greedily.

    Args:
        index: None for the retriever of the configuration.
        config: its `agent` section says how to search; the model should have been trained with the same.
        on_text: told the trajectory while it unfolds, for people to read.

    Returns:
        `{"question", "answer", "stop_reason", "steps": [{"query", "hits": [{"id", "title", "text", "score"}],
        "record"}]}`.

    Raises:
        UserError, RetrieverError: no such model or index, or no server that answers.
    """
    check_models([model])
    searched = _searched(index, config, display)
    spec = PolicySpec(
        SEARCHER,
        config.model.at(model),
        config.rollout.with_one(concurrency=1, enforce_eager=True),
    )
    retriever = config.retriever.model_copy(update={"replicas": 1})
    with ray_session(config.cluster):
        with display.status("starting the retriever and vLLM"):
            cluster = Cluster([spec], config.cluster, retriever, searched)
        with cluster, _watching(lambda event: show(event, on_text)) as on_event:
            (episode,) = cluster.greedy(
                SearchProgram(config.agent, on_event=on_event),
                [Question("ask", question, ("",))],
                {SEARCHER: cluster.policy(SEARCHER)},
            )
    return as_json(question, episode.turn(SEARCHER))


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


def _searched(index: Path | None, config: Config, display: Display) -> Searched:
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
    read_manifest(Path(searched))
    return Path(searched)


def run_config_of(model: str) -> Path | None:
    """The configuration of the run that a model directory (RUN/iterations/N/POLICY/model) belongs to, if it does.

    Raises:
        UserError: the run is of an earlier version.
    """
    run = next(
        (parent.parent for parent in Path(model).resolve().parents if parent.name == "iterations"), None
    )
    if run is None or not (run / "config.yaml").is_file():
        return None
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


def as_json(question: str, trajectory: Trajectory) -> Json:
    """A trajectory for programs."""
    return {
        "question": question,
        "answer": trajectory.answer,
        "stop_reason": trajectory.stop_reason.value,
        "steps": [
            {
                "query": step.query,
                "hits": [
                    {"id": h.passage.id, "title": h.passage.title, "text": h.passage.text, "score": h.score}
                    for h in step.hits
                ],
                "record": step.record,
            }
            for step in trajectory.steps
        ],
    }
