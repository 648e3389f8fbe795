"""With an index: search, evaluate, serve."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retriever_service.choices import DEFAULT_KS
from retriever_service.cli.program import app
from retriever_service.console import (
    AsJson,
    Candidates,
    Device,
    IndexDir,
    MethodName,
    Reranker,
    SearchParameters,
    progress,
    say,
)
from retriever_service.errors import RetrieverError
from retriever_service.service.settings import TOKEN_VARIABLE, ServerSettings

if TYPE_CHECKING:
    from retriever_service.passages.hits import Hit

_SERVING = ServerSettings()
_RUN_DEPTH = max(DEFAULT_KS) + 1
"""One of them may be the question itself, which does not count."""


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: IndexDir,
    k: Annotated[int, typer.Option("-k", help="Number of passages.")] = 5,
    method: MethodName = "dense",
    rerank: Reranker = None,
    candidates: Candidates = 50,
    where: Annotated[
        str | None, typer.Option(help='Filter on metadata, JSON: \'{"year": {"gte": 1990}}\'.')
    ] = None,
    distinct: Annotated[bool, typer.Option("--distinct", help="Leave out near-copies.")] = False,
    search_parameters: SearchParameters = "",
    as_json: AsJson = False,
) -> None:
    """Search an index.

    Example: exsearch index search --index index -k 3 "maker of the Silver Harp"
    """
    from retriever_service.passages.hits import SearchOptions
    from retriever_service.search.engine import SearchEngine

    if not query.strip():
        raise RetrieverError("the query is empty; say what to look for")
    engine = SearchEngine.open(index, search_parameters=search_parameters, reranker=rerank)
    options = SearchOptions(method, candidates if rerank else 0, _filter(where), distinct=distinct)
    (hits,) = engine.search([query], k, options)
    if as_json:
        typer.echo(json.dumps({"query": query, "hits": [_row(hit) for hit in hits]}, ensure_ascii=False))
        return
    for rank, hit in enumerate(hits, start=1):
        passage = hit.passage
        typer.echo(f"[{rank}] {hit.score:.3f}  {passage.title} ({passage.id})\n    {passage.text}")


@app.command()
def evaluate(
    index: IndexDir,
    queries: Annotated[Path, typer.Option(help="JSON Lines: {_id, text} or {id, question}.")],
    qrels: Annotated[Path, typer.Option(help="Judgements: BEIR's TSV or TREC's.")],
    method: MethodName = "dense",
    rerank: Reranker = None,
    candidates: Candidates = 50,
    search_parameters: SearchParameters = "",
    run_in: Annotated[
        Path | None, typer.Option("--run", help="Evaluate this TREC run instead of searching.")
    ] = None,
    run_out: Annotated[Path | None, typer.Option("--save-run", help="Write the TREC run here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score searches against judgements: nDCG, recall, MRR, and all gold passages found; as fractions.

    Example: exsearch index evaluate --index index --queries queries.jsonl --qrels qrels.tsv
    """
    from retriever_service.passages.evaluation import (
        evaluate_run,
        read_qrels,
        read_queries,
        read_run,
        write_run,
    )
    from retriever_service.passages.hits import SearchOptions
    from retriever_service.search.engine import SearchEngine

    judged = read_qrels(qrels)
    asked = {id_: text for id_, text in read_queries(queries).items() if id_ in judged}
    if not asked:
        raise RetrieverError(f"no question of {queries} is judged in {qrels}; do they belong together?")
    if len(asked) < len(judged):
        raise RetrieverError(
            f"{len(judged) - len(asked):,} of {len(judged):,} questions that {qrels} judges are not in {queries}, and "
            "would count as not answered; give all of them, or judgements of those that are there"
        )
    if run_in is not None:
        run = read_run(run_in)
    else:
        engine = SearchEngine.open(index, search_parameters=search_parameters, reranker=rerank)
        options = SearchOptions(method, candidates if rerank else 0)
        ids, run = list(asked), {}
        with progress("searching", "questions") as advance:
            for start in range(0, len(ids), 64):
                part = ids[start : start + 64]
                found = engine.search([asked[id_] for id_ in part], _RUN_DEPTH, options)
                run |= {
                    id_: [(h.passage.id, h.score) for h in hits]
                    for id_, hits in zip(part, found, strict=True)
                }
                advance(start + len(part), len(ids))
    if run_out is not None:
        write_run(run, run_out, tag=f"exsearch-{method}")
    scores = {"questions": len(judged)} | evaluate_run(judged, run)
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for name, value in scores.items():
        typer.echo(f"{name:>14}  {value:.4f}" if isinstance(value, float) else f"{name:>14}  {value}")


@app.command()
def serve(
    index: IndexDir,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _SERVING.host,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = _SERVING.port,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all).")] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="That search; each loads an encoder (default: one per thread, at most 4; 1 on a GPU)."
        ),
    ] = None,
    search_parameters: SearchParameters = "",
    rerank: Reranker = None,
    max_batch: Annotated[int, typer.Option(help="Most queries encoded at once.")] = _SERVING.max_batch,
    max_waiting: Annotated[
        int, typer.Option(help="Queries that may wait; beyond it: 429.")
    ] = _SERVING.max_waiting,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which a search is given up: 504.")
    ] = _SERVING.deadline_s,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="No additions or deletions.")
    ] = _SERVING.read_only,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare checksums first.")
    ] = False,
) -> None:
    """Serve an index over HTTP, also in the forms of Search-R1 and of the original EXSEARCH.

    A bearer token is asked for if the environment variable EXSEARCH_TOKEN is set.

    Example: exsearch index serve --index index --port 8000
    """
    from retriever_service.index.read_ahead import read_ahead
    from retriever_service.index.store import verify_checksums
    from retriever_service.service.engine_processes import engine_opener
    from retriever_service.service.server import Engine
    from retriever_service.service.server import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = ServerSettings(
        host=host,
        port=port,
        token=os.environ.get(TOKEN_VARIABLE),
        read_only=read_only,
        max_batch=max_batch,
        max_waiting=max_waiting,
        deadline_s=deadline,
    )

    open_engine = engine_opener(
        index,
        device=device,
        threads=threads,
        processes=processes,
        search_parameters=search_parameters,
        reranker=rerank,
    )

    def open_checked() -> Engine:
        if verify:
            verify_checksums(index)
        engine = open_engine()
        read_ahead(index)
        return engine

    run(settings, open_checked, on_listening=lambda url: say(f"serving {index} at {url} (Ctrl-C to stop)"))


def _filter(where: str | None) -> Any:
    from retriever_service.files import json_object
    from retriever_service.passages.filters import Filter

    if where is None:
        return None
    try:
        conditions = json_object(where.encode())
    except ValueError as error:
        raise RetrieverError(f"--where {where!r:.200} is no JSON object: {error}") from error
    return Filter.parse(conditions)


def _row(hit: Hit) -> dict[str, Any]:
    passage = hit.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "metadata": dict(passage.metadata),
        "score": hit.score,
    }
