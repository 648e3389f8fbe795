"""Who is answered, what is told of the server, the page, and requests that nobody would write by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
