"""What the command line adds to the library; `tests/pipeline/test_cli.py` has its other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retriever_service.building.build import build_index
from retriever_service.cli import app
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.service.settings import TOKEN_VARIABLE, ServerSettings
from tests.retriever_service.support import load_hash_encoder, write_jsonl


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


def test_evaluation_of_questions_that_are_passages_looks_one_passage_deeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question itself is left out, and the last of the first hundred must not be lost by it."""
    passages = [{"id": f"p{number}", "text": "a lion " + "and a tiger " * number} for number in range(120)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", passages)
    monkeypatch.setattr("retriever_service.encoding.encoder.Encoder.load", load_hash_encoder)
    build_index([corpus], tmp_path / "index", EncoderSpec("hash"), bm25=True, load_encoder=load_hash_encoder)
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"_id": "p0", "text": "lion"}])
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"p0\tp{n}\t1\n" for n in range(1, 101)))
    files = ["--index", tmp_path / "index", "--queries", queries, "--qrels", qrels]
    result = CliRunner().invoke(app, ["evaluate", *map(str, files), "--method", "bm25", "--json"])
    assert json.loads(result.stdout)["all_gold@100"] == 1.0
