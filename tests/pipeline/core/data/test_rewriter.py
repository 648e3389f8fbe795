"""Steps of a cold start that a language model has put in other words, beside a local server in its place."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import AgentConfig
from pipeline.core.data.cold_start import ColdStartResult, synthesise
from pipeline.core.data.rewriter import RewriteError, Rewriter
from pipeline.core.records import Question
from pipeline.core.renderer import Renderer
from tests.pipeline.core.data.cold_start_support import CORPUS, HOPS, QUESTION, by_overlap

Reply = tuple[int, str]


class ChatServer:
    """An OpenAI-compatible endpoint on this machine: gives the (status, content) replies in turn."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self.replies = list(replies)
        self.requests: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                    reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                time.sleep(0.01)  # long enough for requests to overlap
                content = json.dumps({"choices": [{"message": {"content": reply[1]}}]}).encode()
                with lock:
                    server.running -= 1
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    servers: list[ChatServer] = []

    def start(*replies: Reply) -> ChatServer:
        server = ChatServer(replies)
        servers.append(server)
        threading.Thread(target=server.http.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


BETTER = [
    {"query": "Who makes it?", "evidence": "Orvane makes the Silver Harp."},
    {"query": "Who began Orvane?", "evidence": "Mara Velin began Orvane."},
]
GOOD = (200, "Here you are: " + json.dumps(BETTER))


def rewriting(
    tokenizer: Any, url: str, cache: Path, *questions: Question, max_attempts: int = 3
) -> ColdStartResult:
    async def run() -> ColdStartResult:
        renderer = Renderer(tokenizer, AgentConfig(documents=2))
        rewriter = Rewriter(url, "writer", cache, concurrency=2, max_attempts=max_attempts, backoff_s=0.001)
        async with rewriter:
            return await synthesise(
                questions, renderer, by_overlap, CORPUS.get, max_length=4096, seed=0, rewriter=rewriter
            )

    return asyncio.run(run())


def test_rewritten_steps_keep_their_passages_and_are_asked_for_once(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(GOOD)
    cache = tmp_path / "cache.jsonl"
    for _ in range(2):
        (trajectory,) = rewriting(tokenizer, server.url, cache, QUESTION).trajectories
        assert [step.query for step in trajectory.steps] == ["Who makes it?", "Who began Orvane?"]
        assert trajectory.steps[1].record == "Mara Velin began Orvane."
        assert "harp" in {hit.passage.id for hit in trajectory.steps[0].hits}
    (request,) = server.requests
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert request["model"] == "writer"
    assert "Silver Harp" in request["messages"][1]["content"]
    assert "secret" not in cache.read_text()


def test_a_kept_answer_that_is_damaged_is_asked_for_again(tokenizer: Any, serve: Any, tmp_path: Path) -> None:
    server, cache = serve(GOOD), tmp_path / "cache.jsonl"
    rewriting(tokenizer, server.url, cache, QUESTION)
    row = json.loads(cache.read_text())
    for content in ("[{", "[" * 200_000, 7):
        cache.write_text(json.dumps(row | {"content": content}) + "\n")
        asked = len(server.requests)
        assert len(rewriting(tokenizer, server.url, cache, QUESTION).trajectories) == 1
        assert len(server.requests) == asked + 1


def test_a_cache_line_that_a_kill_cut_off_is_asked_for_again(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    server, cache = serve(GOOD), tmp_path / "cache.jsonl"
    cache.write_text('{"key": "abc", "con')
    rewriting(tokenizer, server.url, cache, QUESTION)
    rewriting(tokenizer, server.url, cache, QUESTION)
    assert len(server.requests) == 1


def test_passing_failures_are_retried(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    lost_answer = [BETTER[0], {"query": "Who?", "evidence": "Somebody began Orvane."}]
    server = serve((503, ""), (200, json.dumps(lost_answer)), GOOD)
    assert len(rewriting(tokenizer, server.url, tmp_path / "c.jsonl", QUESTION).trajectories) == 1
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "content",
    ["Sorry.", "[]", '[{"query": "q"}, {"query": "q"}]', json.dumps([{"query": "", "evidence": "e"}] * 2)],
)
def test_a_question_that_the_endpoint_cannot_rewrite_is_skipped_and_counted(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer], content: str
) -> None:
    server = serve((200, content))
    result = rewriting(tokenizer, server.url, tmp_path / "c.jsonl", QUESTION)
    assert result.skipped == {"endpoint gave no usable rewriting": 1}
    assert len(server.requests) == 3


def test_an_endpoint_that_keeps_failing_ends_the_synthesis(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    failing = serve((500, ""))
    with pytest.raises(RewriteError, match="500"):
        rewriting(tokenizer, failing.url, tmp_path / "c.jsonl", QUESTION)
    assert len(failing.requests) == 3
    refusing = serve((401, ""))
    with pytest.raises(RewriteError, match="401"):
        rewriting(tokenizer, refusing.url, tmp_path / "c.jsonl", QUESTION)
    assert len(refusing.requests) == 1
    with pytest.raises(RewriteError, match="ConnectError"):
        rewriting(tokenizer, "http://127.0.0.1:9/v1", tmp_path / "c.jsonl", QUESTION)


def test_requests_in_flight_are_bounded(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    server = serve(GOOD)
    questions = [
        Question(str(n), f"{QUESTION.text} {n}", QUESTION.answers, "", 2, QUESTION.supporting_ids, HOPS)
        for n in range(12)
    ]
    assert len(rewriting(tokenizer, server.url, tmp_path / "c.jsonl", *questions).trajectories) == 12
    assert server.most_running <= 2
