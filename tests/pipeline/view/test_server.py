"""The pages over HTTP: whom the server answers, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pipeline.view.pages import Pages
from pipeline.view.server import create_app
from tests.pipeline.view_support import Writer, asked


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = Writer(tmp_path / "run", asked(2))
    writer.evaluated("test/best", "10")
    return writer.path


@pytest.fixture
def client(run: Path) -> TestClient:
    app = create_app(Pages([run], live=True), frozenset({"127.0.0.1", "[::1]"}))
    return TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


def test_the_page_and_its_data(client: TestClient) -> None:
    page = client.get("/")
    scripts = [line.split('"')[1] for line in page.text.splitlines() if line.startswith("<script")]

    assert (page.status_code, len(scripts)) == (200, 7)
    for name in (*scripts, "style.css"):
        assert client.get(f"/{name}").status_code == 200, name
    assert client.get("/api/rows/0/test-best/table/0").json()["columns"]["em"] == [1, 0]


@pytest.mark.parametrize("name", ["rows/0/x/y", "nothing", "..%2f..%2fetc%2fpasswd"])
def test_what_is_not_there_is_a_404_with_a_reason(client: TestClient, name: str) -> None:
    answer = client.get(f"/api/{name}")

    assert (answer.status_code, "there is no page" in answer.json()["error"]) == (404, True)


def test_a_damaged_run_is_an_error_that_names_the_file(client: TestClient, run: Path) -> None:
    (run / "test/best.parquet").write_bytes(b"no")

    answer = client.get("/api/rows/0/test-best/table/0")
    assert (answer.status_code, "test/best.parquet is damaged" in answer.json()["error"]) == (500, True)


def test_a_fault_of_the_server_is_json_too_and_tells_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Pages, "page", fail)
    answer = client.get("/api/runs")
    assert (answer.status_code, "the server failed" in answer.json()["error"], "secret" in answer.text) == (
        500,
        True,
        False,
    )


def test_a_name_that_somebody_else_has_made_point_here_is_refused(client: TestClient) -> None:
    for host in ("attacker.example", "attacker.example:8765", "127.0.0.1.attacker.example", "[::2]:80", ""):
        assert client.get("/api/runs", headers={"host": host}).status_code == 400, host
    for host in ("127.0.0.1:8765", "127.0.0.1", "[::1]:8765", "[::1]"):
        assert client.get("/api/runs", headers={"host": host}).status_code == 200, host


def test_the_page_runs_no_scripts_but_its_own(client: TestClient) -> None:
    for path in ("/", "/api/runs", "/app.js", "/nothing"):
        assert client.get(path).headers["content-security-policy"] == (
            "default-src 'self'; img-src data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        ), path
    assert "style=" not in client.get("/").text


@pytest.mark.parametrize("path", ["/..%2fserver.py", "/%2e%2e/pages.py", "/....//pages.py", "//etc/passwd"])
def test_no_other_file_can_be_had(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_nothing_can_be_changed(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/api/runs").status_code == 405, method
