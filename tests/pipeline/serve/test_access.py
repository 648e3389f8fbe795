"""Who is answered, what is told of the server, the page, and requests that nobody would write by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from retriever_service.service.hosts import own_names
from tests.pipeline.serve_support import Running, serving


@pytest.fixture
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def metric(server: Running, name: str) -> float:
    with server.http as client:
        lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_without_the_token_nothing_but_the_page_and_its_state_is_given() -> None:
    with serving(token="secret") as server, server.http as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/mcp", "/nothing"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                reply = client.get(path, headers=headers)
                error = reply.json()["error"]
                assert (reply.status_code, error["type"]) == (401, "authentication_error"), path
        assert server.ask().status_code == 401
        for path in ("/", "/chat.js", "/chat.css", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200, path
        assert [model.id for model in server.openai.models.list()] == ["exsearch"]


def test_a_name_that_somebody_else_has_made_point_here_is_refused(server: Running) -> None:
    with server.http as client:
        for path in ("/", "/v1/models", "/mcp"):
            assert client.get(path, headers={"host": "attacker.example"}).status_code == 400, path


def test_names_that_a_proxy_in_front_gives_it_are_answered() -> None:
    with serving(allowed_hosts=("Chat.example.org", "[::2]")) as server, server.http as client:
        for host in ("chat.example.org", "chat.example.org:443", "[::2]:443", "127.0.0.1", "localhost:8080"):
            assert client.get("/", headers={"host": host}).status_code == 200, host
        for host in ("attacker.example", "chat.example.org.attacker.example"):
            assert client.get("/", headers={"host": host}).status_code == 400, host


def test_on_all_addresses_any_name_is_answered_unless_some_are_given() -> None:
    assert own_names("0.0.0.0", "http://0.0.0.0:1") is None
    assert own_names("0.0.0.0", "http://0.0.0.0:1", ["here"]) == {
        "localhost", "127.0.0.1", "[::1]", "0.0.0.0", "here",
    }  # fmt: skip


ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def test_pages_of_an_origin_that_is_allowed_may_ask_with_the_token() -> None:
    with serving(token="secret", allow_origins=(ORIGIN,)) as server, server.http as client:
        before = client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == ORIGIN
        assert before.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        asked = {"authorization": "Bearer secret", "origin": ORIGIN}
        for headers, status in ((asked, 200), ({"origin": ORIGIN}, 401)):
            reply = client.get("/v1/models", headers=headers)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, ORIGIN)


def test_pages_of_other_origins_are_told_nothing() -> None:
    other = {**PREFLIGHT, "origin": "https://attacker.example"}
    with serving(allow_origins=(ORIGIN,)) as server, server.http as client:
        refused = client.options("/v1/chat/completions", headers=other)
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=other).headers
        named = {**PREFLIGHT, "host": "attacker.example"}
        assert client.options("/v1/chat/completions", headers=named).status_code == 400
    with serving() as server, server.http as client:
        assert client.options("/v1/chat/completions", headers=PREFLIGHT).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=PREFLIGHT).headers


def test_the_page_loads_and_runs_nothing_but_its_own_files(server: Running) -> None:
    with server.http as client:
        page = client.get("/")
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        named = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
        assert named and all(client.get(name).status_code == 200 for name in named)
        assert not re.search(r"<script>|style=| on\w+=", page.text)
        assert "http" not in page.text.replace("http-equiv", "")


def test_models_are_told_by_name(server: Running) -> None:
    client = server.openai
    assert client.models.retrieve("exsearch").id == "exsearch"
    with server.http as http:
        assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_unknown_routes_and_methods_are_told_in_the_same_form(server: Running) -> None:
    with server.http as client:
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        reply = client.get("/v1/chat/completions")
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


def test_what_was_done_is_counted(server: Running) -> None:
    server.ask()
    server.ask(model="other")
    assert metric(server, 'exsearch_answers_total{stop_reason="answered"}') == 1
    assert metric(server, 'exsearch_tokens_total{kind="completion"}') == 6
    assert metric(server, "exsearch_searches_total") == 2
    assert metric(server, 'exsearch_errors_total{kind="model_not_found"}') == 1
    assert metric(server, "exsearch_answers_in_flight") == metric(server, "exsearch_answers_waiting") == 0
    assert metric(server, "exsearch_model_version") == metric(server, "exsearch_ready") == 1


def test_no_request_at_all_is_a_fault_of_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run"]
    options = [
        "--header=Authorization: Bearer secret",
        "--phases=examples,coverage,fuzzing",
        "--max-examples=5",
        "--checks=not_a_server_error,status_code_conformance",
        "--seed=1",
        "--generation-database=none",
        "--no-color",
    ]
    with serving(token="secret") as server:
        command += [f"{server.url}/openapi.json", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr
    assert "Tested: 7" in done.stdout
