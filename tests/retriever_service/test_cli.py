"""What the command line adds to the library; `tests/pipeline/test_cli.py` has its other commands."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from retriever_service.cli import app
from retriever_service.service.settings import TOKEN_VARIABLE, ServerSettings


def test_an_empty_query_is_refused_on_the_command_line() -> None:
    for query in ("", " \n"):
        result = CliRunner().invoke(app, ["search", query, "--index", "nowhere"])
        assert result.exit_code == 2
        assert "the query is empty" in result.stderr


def test_served_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line has no defaults of its own."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    served: list[ServerSettings] = []
    monkeypatch.setattr(
        "retriever_service.service.server.serve", lambda settings, *_, **__: served.append(settings)
    )
    assert CliRunner().invoke(app, ["serve", "--index", "index"]).exit_code == 0
    CliRunner().invoke(
        app, ["serve", "--index", "index", "--max-waiting", "3", "--deadline", "2", "--read-only"]
    )
    assert served == [ServerSettings(), ServerSettings(max_waiting=3, deadline_s=2.0, read_only=True)]
