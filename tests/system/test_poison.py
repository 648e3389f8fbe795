"""A retrieval server that answers one query with a senseless passage, each time it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.record_tables import examples_from_table, trajectories_from_table
from pipeline.core.records import StopReason
from retriever_service.search.engine import SearchEngine
from tests.system.conftest import SEARCHER, overrides
from tests.system.processes import finish

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.timeout(900)]

POISONED = 20
"""Which of the different queries, in the order in which they come."""


@contextmanager
def poisoning_server(index: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of the Search-R1 contract; its address and the queries that it has seen, each once."""
    engine, lock, seen = SearchEngine.open(index), threading.Lock(), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                results = [self._answer(query, request["topk"]) for query in request["queries"]]
            body = json.dumps({"result": results}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self, query: str, k: int) -> list[dict[str, Any]]:
            if query not in seen:
                seen.append(query)
            if seen.index(query) == POISONED:
                return [{"document": {"id": "p", "contents": ""}, "score": 1.0}]
            (hits,) = engine.search([query], k)
            return [
                {
                    "document": {"id": h.passage.id, "contents": f'"{h.passage.title}"\n{h.passage.text}'},
                    "score": h.score,
                }
                for h in hits
            ]

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_a_senseless_answer_costs_the_trajectories_that_asked_for_it_and_nothing_else(
    world: Path, index: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with poisoning_server(index) as (url, seen):
        settings = [row for row in overrides(world, index, SEARCHER) if not row.startswith("retriever.")]
        settings += [f"retriever.url={url}", "retriever.dialect=search-r1", "cold_start.questions=0"]
        settings += ["rollout.samples=8", "learner.num_ranks=1", "data.test=[]", "data.dev_limit=1"]
        # Which query it is depends on their order: one that all trajectories of a question begin with costs eight.
        settings += ["rollout.max_failure_share=0.3"]
        finish(run, settings)
    assert len(seen) > POISONED
    iteration = run / "iterations/0001"
    rows = trajectories_from_table(pq.read_table(iteration / "rollouts"))
    lost = {f"{t.question_id}/{t.sample}" for t in rows if t.stop_reason is StopReason.RETRIEVER_BAD_ANSWER}
    reasons = json.loads((iteration / "sample.json").read_text())["stop_reasons"]
    assert 1 <= len(lost) == reasons["retriever_bad_answer"] < len(rows) / 4
    assert reasons["retriever_unavailable"] == reasons["engine_error"] == 0
    trained = {e.id for e in examples_from_table(pq.read_table(iteration / "searcher/examples"))}
    assert trained and not trained & lost
