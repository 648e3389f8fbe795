"""A real engine, a real index and the official clients: what is served is what was trained, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pyarrow.parquet as pq
import pytest

from actors.answering import AnsweringAgent
from actors.session import actor_environment
from pipeline.core.config import Config
from pipeline.core.config.loading import load_config
from pipeline.core.data.world.writer import WorldSpec, generate_passages, generate_questions
from pipeline.core.policies import Snapshot
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.service.lifecycle import State
from tests.pipeline.serve_support import Running, serving, until
from tests.retriever_service.server_process import agent_server, index_server

pytestmark = [pytest.mark.component, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[3]
MODEL = str(ROOT / "models" / "tiny-searcher")
WAIT_S = 600.0
"""Bound of every wait here, in seconds: engines start in half a minute, or in many where the machine is busy."""
QUESTIONS = 8
SMALL = [
    "model.max_length=1024",
    "rollout.kv_cache_gib=0.25",
    "rollout.dtype=float32",
    "retriever.max_attempts=1",
    f"cluster.start_timeout_s={WAIT_S}",
    f"cluster.heartbeat_timeout_s={WAIT_S}",
]


@pytest.fixture(scope="module", autouse=True)
def _environment_stays() -> Iterator[None]:
    """An agent prepares its process for an engine; what it loads beforehand does not go into other programs."""
    before = {name: os.environ.get(name) for name in actor_environment(on_gpu=False)}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    spec = WorldSpec(seed=3, num_passages=200, num_train=8, num_dev=4, num_test=QUESTIONS)
    files = {"corpus": generate_passages(spec), "test": generate_questions(spec, "test")}
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_index([str(out / "corpus.jsonl")], out / "index", EncoderSpec("minilm"))
    return out


@pytest.fixture(scope="module")
def questions(world: Path) -> dict[str, str]:
    rows = map(json.loads, (world / "test.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["question"] for row in rows}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, SMALL)


class Iterations:
    """In place of a run: its newest version is what a test says; its model is always the same."""

    def __init__(self) -> None:
        self.newest = 0

    def __call__(self, version: int) -> Snapshot | None:
        return Snapshot(self.newest, MODEL) if self.newest > version else None


@pytest.fixture(scope="module")
def iterations() -> Iterations:
    return Iterations()


@pytest.fixture(scope="module")
def server(world: Path, config: Config, iterations: Iterations) -> Iterator[Running]:
    agent = AnsweringAgent(config, Snapshot(0, MODEL), world / "index")
    with serving(
        agent, iterations, wait_s=WAIT_S, deadline_s=WAIT_S, follow_s=0.05, max_waiting=64
    ) as running:
        yield running


def messages(question: str) -> Any:
    return [{"role": "user", "content": question}]


def token_ids(server: Running, question: str) -> list[int]:
    reply = server.ask(messages=messages(question), return_token_ids=True)
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["exsearch"]["token_ids"]
    return ids


@pytest.fixture(scope="module")
def served(server: Running, questions: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of the answers to all questions, asked at once."""
    with ThreadPoolExecutor(QUESTIONS) as pool:
        found = pool.map(lambda text: token_ids(server, text), questions.values())
        return dict(zip(questions, found, strict=True))


def test_the_official_client_streams_an_answer_and_sees_the_searches(
    server: Running, questions: dict[str, str], served: dict[str, list[int]]
) -> None:
    (id_, question), *_ = questions.items()
    stream = server.openai.chat.completions.create(
        model="exsearch", messages=messages(question), stream=True, extra_body={"return_token_ids": True}
    )
    chunks = list(stream)
    extensions = [chunk.model_extra.get("exsearch", {}) for chunk in chunks if chunk.model_extra]
    searches = [e["event"] for e in extensions if e.get("event", {}).get("type") == "search"]
    assert searches and all(search["passages"] for search in searches)
    assert extensions[-1]["token_ids"] == served[id_], "alone, and among others"


def test_64_conversations_at_once(
    server: Running, questions: dict[str, str], served: dict[str, list[int]]
) -> None:
    asked = [id_ for _ in range(64 // QUESTIONS) for id_ in questions]
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda id_: token_ids(server, questions[id_]), asked))
    assert found == [served[id_] for id_ in asked]


def test_a_client_that_goes_leaves_nothing_in_the_engine(server: Running, questions: dict[str, str]) -> None:
    stream = server.openai.chat.completions.create(
        model="exsearch", messages=messages(next(iter(questions.values()))), stream=True, temperature=1.0
    )
    next(stream)
    stream.close()
    engine = server.agent._engine._llm
    until(
        lambda: not server.service._admitted and not engine.output_processor.has_unfinished_requests(), WAIT_S
    )


def test_a_newer_iteration_is_taken_up_without_a_dropped_answer(
    server: Running, questions: dict[str, str], iterations: Iterations, served: dict[str, list[int]]
) -> None:
    stop = threading.Event()

    def keep_asking(id_: str) -> list[bool]:
        found = []
        while not stop.is_set():
            found.append(token_ids(server, questions[id_]) == served[id_])
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, id_) for id_ in list(questions)[:4]]
        iterations.newest = 3
        until(lambda: server.agent.version == 3, WAIT_S)
        stop.set()
        assert all(all(future.result(WAIT_S)) for future in asking)
    assert server.ask(messages=messages("Who?")).json()["exsearch"]["version"] == 3


def engine_process(server: int | None = None) -> psutil.Process:
    """A server's, by default this process': the last that it started; other tests may have left theirs up."""
    alive = [c for c in psutil.Process(server).children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE]
    engines = [child for child in alive if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    return max(engines, key=psutil.Process.create_time)


@pytest.mark.chaos
def test_an_engine_that_is_killed_in_mid_answer_is_a_typed_error_and_comes_back(
    server: Running, questions: dict[str, str], served: dict[str, list[int]]
) -> None:
    (id_, question), *_ = questions.items()
    process = engine_process()
    process.suspend()  # the answer is certainly not there yet
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.ask, messages=messages(question))
        until(lambda: server.service._admitted, WAIT_S)
        process.send_signal(signal.SIGKILL)
        error = reply.result(WAIT_S).json()["error"]
    assert (error["code"], error["type"]) == ("engine_error", "server_error")
    until(lambda: server.service.metrics.restarts._value.get() == 1, WAIT_S)
    until(lambda: server.service.state is State.READY, WAIT_S)
    assert token_ids(server, question) == served[id_]


@pytest.fixture(scope="module")
def after(server: Running, served: dict[str, list[int]]) -> dict[str, list[int]]:
    """What was served; from here on the engine's memory is others'."""
    server.run(server.service.drain())
    server.run(server.agent.close())
    return served


@pytest.mark.chaos
def test_asked_and_evaluated_the_same_questions_have_the_same_token_ids(
    after: dict[str, list[int]],
    world: Path,
    questions: dict[str, str],
    config: Config,
    environment: None,
    tmp_path: Path,
) -> None:
    from pipeline.commands.ask import ask
    from pipeline.commands.evaluate import evaluate_model
    from pipeline.core.display import Display

    file, said = tmp_path / "questions.jsonl", []
    file.write_text("".join(json.dumps({"id": i, "question": q}) + "\n" for i, q in questions.items()))
    with pytest.MonkeyPatch.context() as patch:
        # What is printed has no token ids.
        patch.setattr(
            "pipeline.commands.ask.as_json",
            lambda question, trajectory: {"ids": trajectory.token_ids.tolist()},
        )
        ask(None, file, MODEL, world / "index", config, Display(), said.append, json_lines=True)
    asked = {answer["id"]: answer["ids"] for answer in map(json.loads, said)}
    assert asked == after

    out = tmp_path / "scores.json"
    keys = [*SMALL, f"data.test={world / 'test.jsonl'}", f"retriever.index={world / 'index'}"]
    evaluate_model(None, keys, run=None, model=MODEL, split="test", out=out, display=Display())
    rows = pq.read_table(out.with_suffix(".parquet")).to_pylist()
    assert {row["question_id"]: row["token_ids"] for row in rows} == after


@pytest.mark.chaos
def test_a_client_of_tools_starts_it_and_calls_both_while_the_retriever_lives(
    world: Path, questions: dict[str, str]
) -> None:
    from mcp.client import Client
    from mcp.client.stdio import StdioServerParameters, stdio_client

    async def talk(url: str, retriever: Any) -> None:
        command = ["-m", "pipeline.cli", "serve", "--mcp", "--model", MODEL, "--url", url, *SMALL]
        environment = dict(os.environ) | {"EXSEARCH_TOKEN": "secret"}
        started = StdioServerParameters(command=sys.executable, args=command, cwd=ROOT, env=environment)
        async with (
            asyncio.timeout(WAIT_S),
            Client(stdio_client(started), read_timeout_seconds=WAIT_S) as client,
        ):
            found = await client.call_tool("search", {"query": "a river", "k": 2})
            assert found.structured_content and len(found.structured_content["passages"]) == 2
            question = next(iter(questions.values()))
            answered = await client.call_tool("ask", {"question": question})
            assert answered.structured_content and answered.structured_content["searches"]
            retriever.kill()
            failed = await client.call_tool("ask", {"question": question})
            assert failed.is_error and "retriever_unavailable" in str(failed.content)

    with index_server(world / "index", "secret") as (url, retriever):
        asyncio.run(talk(url, retriever))


@pytest.mark.chaos
def test_a_server_that_is_killed_in_mid_answer_fails_its_clients_and_leaves_no_engine(
    world: Path, questions: dict[str, str]
) -> None:
    arguments = ["--model", MODEL, "--index", str(world / "index"), *SMALL]
    with agent_server(*arguments) as (url, process), httpx.Client(base_url=url) as http:
        until(lambda: http.get("/readyz").status_code == 200, WAIT_S)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
        body = {"model": "exsearch", "messages": messages(next(iter(questions.values())))}
        engine = engine_process(process.pid)
        engine.suspend()  # the answers are certainly not there yet
        stream = client.chat.completions.create(**body, stream=True)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(client.chat.completions.create, **body)
            until(lambda: "exsearch_answers_in_flight 2.0" in http.get("/metrics").text, WAIT_S)
            process.kill()
            with pytest.raises(openai.APIConnectionError):
                whole.result(WAIT_S)
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            list(stream)
        engine.resume()
        assert engine.wait(WAIT_S) is None or not engine.is_running()
