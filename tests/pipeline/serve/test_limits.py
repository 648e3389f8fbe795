"""Limits, deadlines, clients that go, a server that ends, an engine that is lost, a newer model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from actors.weight_transfer import WeightTransferError
from pipeline.core.agents.program import EngineError
from pipeline.core.errors import RunError
from pipeline.core.policies import Snapshot
from tests.pipeline.serve_support import QUESTION, WAIT_S, Running, StandIn, serving, until

BODY = {"model": "exsearch", "messages": [{"role": "user", "content": QUESTION}]}


def held(**options: Any) -> StandIn:
    """An agent whose answers wait."""
    agent = StandIn(**options)
    agent.go_on.clear()
    return agent


def at_once(server: Running, pool: ThreadPoolExecutor, count: int) -> list[Future[httpx.Response]]:
    return [pool.submit(server.ask) for _ in range(count)]


def code_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_as_many_answers_at_once_as_there_is_room_and_all_are_given() -> None:
    agent = held(room=3)
    with serving(agent) as server, ThreadPoolExecutor(16) as pool:
        replies = at_once(server, pool, 16)
        until(lambda: agent.in_flight == 3)
        agent.go_on.set()
        assert [reply.result(WAIT_S).status_code for reply in replies] == [200] * 16
        assert agent.most_in_flight == 3


def test_beyond_what_may_wait_requests_are_told_to_come_back() -> None:
    agent = held(room=1)
    with serving(agent, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        replies = at_once(server, pool, 2)
        until(lambda: len(server.service._admitted) == 2)
        for stream in (False, True):
            refused = server.ask(stream=stream)
            assert code_of(refused) == (429, "too_many_requests")
            assert int(refused.headers["retry-after"]) > 0
        agent.go_on.set()
        assert [reply.result(WAIT_S).status_code for reply in replies] == [200, 200]


def test_an_answer_that_takes_too_long_is_ended_with_its_work() -> None:
    agent = held()
    with serving(agent, deadline_s=0.05) as server:
        assert code_of(server.ask()) == (504, "deadline_exceeded")
        with (
            server.http as client,
            client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as reply,
        ):
            events = "".join(reply.iter_text())
        assert reply.status_code == 200 and '"deadline_exceeded"' in events and "[DONE]" not in events
        until(lambda: agent.cancelled == 2 and agent.in_flight == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_client_that_goes_ends_its_answer(path: str, stream: bool) -> None:
    agent = held()
    body = (
        {**BODY, "stream": stream}
        if "chat" in path
        else {"model": "exsearch", "input": "Who?", "stream": stream}
    )
    with serving(agent) as server:
        gone = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=0.5) as client:
                try:
                    client.post(path, json=body)
                except httpx.ReadTimeout:
                    gone.set()

        threading.Thread(target=ask).start()
        until(lambda: agent.in_flight == 1)
        until(lambda: agent.cancelled == 1 and agent.in_flight == 0)
        assert gone.wait(WAIT_S)


def test_the_official_client_cancels_a_stream() -> None:
    agent = held()
    with serving(agent) as server:
        stream = server.openai.chat.completions.create(**BODY, stream=True)  # type: ignore[call-overload]
        next(stream)
        stream.close()
        until(lambda: agent.cancelled == 1 and agent.in_flight == 0)
        agent.go_on.set()
        assert server.ask().status_code == 200


def test_a_server_that_ends_answers_what_it_has_begun_and_nothing_new() -> None:
    agent = held()
    with serving(agent, grace_s=WAIT_S) as server, ThreadPoolExecutor(2) as pool:
        (reply,) = at_once(server, pool, 1)
        until(lambda: agent.in_flight == 1)
        ended = pool.submit(server.run, server.service.drain())
        with server.http as client:
            until(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/healthz").json() == {"state": "draining"}
        assert code_of(server.ask()) == (503, "not_ready")
        agent.go_on.set()
        assert reply.result(WAIT_S).status_code == 200
        assert ended.result(WAIT_S)
    assert agent.is_closed


def test_what_is_not_done_within_the_grace_period_is_told_so() -> None:
    agent = held()
    with serving(agent, grace_s=0.05) as server, ThreadPoolExecutor(2) as pool:
        (reply,) = at_once(server, pool, 1)
        until(lambda: agent.in_flight == 1)
        server.run(server.service.drain())
        assert code_of(reply.result(WAIT_S)) == (503, "shutting_down")
        assert agent.cancelled == 1


def test_a_lost_engine_fails_what_it_had_in_hand_and_is_started_again() -> None:
    agent = held()
    with serving(agent) as server, ThreadPoolExecutor(2) as pool:
        (reply,) = at_once(server, pool, 1)
        until(lambda: agent.in_flight == 1)
        agent.lost.set()
        assert code_of(reply.result(WAIT_S)) == (503, "engine_error")
        agent.go_on.set()
        until(lambda: agent.starts == 2)
        with server.http as client:
            until(lambda: client.get("/readyz").status_code == 200)
        assert server.ask().status_code == 200


FAILURES = [EngineError("no such luck"), OSError("no such luck"), KeyError("no such luck")]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_an_engine_that_cannot_be_brought_back_ends_the_server_with_the_reason(failure: Exception) -> None:
    agent = StandIn()
    with serving(agent, max_restarts=1) as server:
        agent.fails_to_start = failure
        agent.lost.set()
        until(server.service.failed.is_set)
        assert isinstance(server.service.failure, RunError) and "no such luck" in str(server.service.failure)
        assert agent.starts == 3
        assert server.ask().status_code == 503


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(failure: Exception) -> None:
    agent = StandIn()
    agent.fails_to_start = failure
    with serving(agent, ready=False) as server:
        until(server.service.failed.is_set)
        assert isinstance(server.service.failure, RunError) and "no such luck" in str(server.service.failure)


def test_an_engine_that_cannot_be_watched_any_more_ends_the_server_with_the_reason() -> None:
    agent = StandIn()
    with serving(agent) as server:
        agent.fails_to_watch = OSError("no such luck")
        until(server.service.failed.is_set)
        assert "OSError: no such luck" in str(server.service.failure)


class Iterations:
    """In place of a run: the newest version is what a test says."""

    def __init__(self) -> None:
        self.newest = 1
        self.is_gone = False
        self.looks = 0

    def __call__(self, version: int) -> Snapshot | None:
        self.looks += 1
        if self.is_gone:
            raise OSError("stale file handle")
        return Snapshot(self.newest, f"model-{self.newest}") if self.newest > version else None


def versions(server: Running) -> Callable[[], Any]:
    return lambda: server.ask().json()["exsearch"]["version"]


def test_a_newer_model_waits_for_answers_in_flight_and_drops_none() -> None:
    agent, run = held(), Iterations()
    with serving(agent, run) as server, ThreadPoolExecutor(8) as pool:
        before = at_once(server, pool, 2)
        until(lambda: agent.in_flight == 2)
        run.newest = 2
        until(lambda: not server.service._gate._is_open.is_set())
        meanwhile = at_once(server, pool, 4)
        until(lambda: len(server.service._admitted) == 6)
        assert (agent.in_flight, agent.loaded) == (2, [])
        agent.go_on.set()
        found = [reply.result(WAIT_S).json()["exsearch"]["version"] for reply in [*before, *meanwhile]]
        assert found == [1, 1, 2, 2, 2, 2]
        with server.http as client:
            assert client.get("/v1/models").json()["data"][0]["exsearch"]["version"] == 2


@pytest.mark.parametrize("failure", [WeightTransferError("half a file"), OSError("half a file")], ids=repr)
def test_a_newer_model_that_is_spoilt_is_left_alone(failure: Exception) -> None:
    agent, run = StandIn(), Iterations()
    with serving(agent, run) as server:
        agent.fails_to_load = failure
        run.newest = 2
        until(lambda: agent.starts == 2)
        assert versions(server)() == 1
        agent.fails_to_load = None
        run.newest = 3
        until(lambda: agent.version == 3)
        assert versions(server)() == 3
        assert [snapshot.version for snapshot in agent.loaded] == [3]


def test_a_run_that_cannot_be_read_for_a_while_is_followed_all_the_same() -> None:
    agent, run = StandIn(), Iterations()
    run.is_gone = True
    with serving(agent, run) as server:
        until(lambda: run.looks >= 2)
        assert versions(server)() == 1
        run.newest, run.is_gone = 2, False
        until(lambda: agent.version == 2)
        with server.http as client:
            assert 'exsearch_errors_total{kind="follow"}' in client.get("/metrics").text


def test_it_can_be_told_to_look_at_once() -> None:
    agent, run = StandIn(), Iterations()
    with serving(agent, run, follow_s=3600) as server:
        run.newest = 2
        server.loop.call_soon_threadsafe(server.service.look_now)
        until(lambda: agent.version == 2)
