"""A retrieval server of the published Search-R1 design, over our index: what `bench.service` compares with.

One process, FastAPI, a synchronous handler in its thread pool; every request encodes and searches its own queries,
and FastAPI turns the result into JSON. Two things differ from the published one, both in its favour: it answers with
`return_scores` either way, and a lock lets one request after the other use encoder and index, which is faster than
forty of them that share the processor (and needed: neither is made for several threads).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from retriever_service.passages.hits import Hit
from retriever_service.search.engine import SearchEngine


class QueryRequest(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def create_app(engine: SearchEngine, default_topk: int = 3) -> FastAPI:
    """One request, one search."""
    app = FastAPI()
    one_at_a_time = threading.Lock()

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict[str, Any]:
        with one_at_a_time:
            results = engine.search(request.queries, request.topk or default_topk)
        return {"result": [[_item(hit, request.return_scores) for hit in hits] for hits in results]}

    return app


def serve(index_dir: Path, on_listening: Callable[[str], None]) -> None:
    """Serve on a free port of the loopback address until SIGTERM."""
    app = create_app(SearchEngine.open(index_dir, cached_queries=0))
    with socket.create_server(("127.0.0.1", 0), backlog=2_048) as listener:
        on_listening(f"http://127.0.0.1:{listener.getsockname()[1]}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _item(hit: Hit, with_score: bool) -> dict[str, Any]:
    passage = hit.passage
    document = {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}
    return {"document": document, "score": hit.score} if with_score else document
