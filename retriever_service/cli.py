"""The command line of the retriever: `exsearch index ...`, or alone `python -m retriever_service ...`.

Exit codes: 0 done, 2 the user can mend it (one clear message), 130 or 143 interrupted (Ctrl-C, SIGTERM), 1 anything
else.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retriever_service.choices import DEFAULT_KS
from retriever_service.console import (
    AsJson,
    Candidates,
    Commands,
    CorpusSources,
    Device,
    EncoderDtype,
    EncoderName,
    Factory,
    IndexDir,
    MaxTokens,
    Memory,
    MethodName,
    Normalise,
    Out,
    PassagePrefix,
    PassageTemplate,
    QueryPrefix,
    Reranker,
    SearchParameters,
    TargetRecall,
    VectorsDtype,
    Workers,
    encoder_spec,
    progress,
    say,
    say_built,
)
from retriever_service.errors import RetrieverError
from retriever_service.service.settings import TOKEN_VARIABLE, ServerSettings

if TYPE_CHECKING:
    from retriever_service.passages.hits import Hit

_SERVING = ServerSettings()
_PROBED_PASSAGES = 256
_RUN_DEPTH = max(DEFAULT_KS) + 1
"""One of them may be the question itself, which does not count."""


app = typer.Typer(
    cls=Commands,
    help="Encode, build, search, update and serve retrieval indexes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def encode(
    corpus: CorpusSources,
    out: Out,
    encoder: EncoderName = "minilm",
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    max_tokens: MaxTokens = None,
    encoder_dtype: EncoderDtype = None,
    dtype: VectorsDtype = "float32",
    device: Device = "cpu",
    workers: Workers = None,
    memory: Memory = None,
) -> None:
    """Encode a corpus into a directory of vectors, from which any number of indexes can be built.

    Killed or interrupted, the same command goes on.

    Example: exsearch index encode --corpus wiki.jsonl --encoder intfloat/e5-base-v2 --out wiki-vectors
    """
    from retriever_service.encoding.encode import encode_corpus

    with progress("encoding", "passages") as advance:
        store = encode_corpus(
            corpus,
            out,
            encoder_spec(encoder, query_prefix, passage_prefix, max_tokens, encoder_dtype),
            device=device,
            workers=workers,
            memory_bytes=memory,
            store_dtype=dtype,
            on_progress=advance,
        )
    say(f"{out}: {store.manifest.count:,} passages, {store.manifest.dimension} dimensions, {dtype}")


@app.command()
def build(
    out: Out,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus", help="JSONL file, data set directory or hf:NAME; several times for a union."
        ),
    ] = None,
    vectors: Annotated[Path | None, typer.Option(help="Directory of `encode`, in place of a corpus.")] = None,
    factory: Factory = "Flat",
    encoder: EncoderName = "minilm",
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    max_tokens: MaxTokens = None,
    encoder_dtype: EncoderDtype = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Build a word index too.")] = False,
    recall: TargetRecall = 0.95,
    device: Device = "cpu",
    workers: Workers = None,
    memory: Memory = None,
    seed: Annotated[int, typer.Option(help="Of the sample that an index is trained on.")] = 0,
) -> None:
    """Build an index of a corpus, or of encoded passages. Killed or interrupted, the same command goes on.

    Example: exsearch index build --corpus corpus.jsonl --bm25 --out index

    Example: exsearch index build --vectors wiki-vectors --factory IVF4096,SQ8 --memory 32GiB --out wiki-index
    """
    from retriever_service.building.build import build_from_vectors, build_index
    from retriever_service.encoding.vectors import VectorStore

    if (corpus is None) == (vectors is None):
        raise RetrieverError("give either --corpus or --vectors")
    how: dict[str, Any] = {
        "factory": factory,
        "memory_bytes": memory,
        "bm25": bm25,
        "target_recall": recall,
        "seed": seed,
    }
    with progress("indexing", "passages") as advance:
        if vectors is not None:
            manifest = build_from_vectors(VectorStore.open(vectors), out, **how)
        else:
            manifest = build_index(
                corpus or [],
                out,
                encoder_spec(encoder, query_prefix, passage_prefix, max_tokens, encoder_dtype),
                device=device,
                workers=workers,
                on_progress=advance,
                **how,
            )
    say_built(out, manifest)


@app.command("import")
def import_(
    index: Annotated[Path, typer.Argument(help="A file that FAISS wrote, or Pyserini's folder of one.")],
    corpus: CorpusSources,
    out: Out,
    encoder: EncoderName = "minilm",
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    passage_template: PassageTemplate = None,
    normalise: Normalise = None,
    max_tokens: MaxTokens = None,
    encoder_dtype: EncoderDtype = None,
    ids: Annotated[
        Path | None, typer.Option(help="Ids of the rows' passages, a line each (default: the corpus' order).")
    ] = None,
    search_parameters: SearchParameters = "",
    recall: TargetRecall = 0.95,
    bm25: Annotated[bool, typer.Option("--bm25", help="Build a word index too.")] = False,
    link: Annotated[
        bool, typer.Option("--link", help="A hard link in place of a copy; never change the file then.")
    ] = False,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the passages that are compared, and tuned with.")] = 0,
) -> None:
    """Take over an index that FAISS wrote elsewhere, without encoding its corpus again.

    Some passages are encoded and compared with its vectors. Killed or interrupted, the same command goes on.

    Example: exsearch index import e5_Flat.index --corpus wiki-18.jsonl --encoder intfloat/e5-base-v2 --out wiki
    """
    from retriever_service.building.importing import import_index

    spec = encoder_spec(encoder, query_prefix, passage_prefix, max_tokens, encoder_dtype)
    with progress("importing", "passages") as advance:
        manifest = import_index(
            index,
            corpus,
            out,
            dataclasses.replace(spec, passage_template=passage_template, normalise=normalise),
            ids=ids,
            search_parameters=search_parameters,
            target_recall=recall,
            bm25=bm25,
            link=link,
            device=device,
            on_progress=advance,
            seed=seed,
        )
    say_built(out, manifest)


@app.command()
def plan(
    passages: Annotated[int, typer.Option(help="How many.")],
    factory: Factory = "Flat",
    dimension: Annotated[int, typer.Option(help="Of the encoder's vectors (384: minilm).")] = 384,
    corpus: Annotated[
        list[str] | None,
        typer.Option("--corpus", help="Take the length of passages from here, and time encoding."),
    ] = None,
    encoder: EncoderName = "minilm",
    bm25: Annotated[
        bool, typer.Option("--bm25", help="With a word index: its memory and disk, not its time.")
    ] = False,
    memory: Memory = None,
    out: Annotated[Path, typer.Option("--out", help="Where it would be built.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Predict disk, memory and time of an index, and whether it fits here. Measures this machine for seconds.

    Example: exsearch index plan --passages 21000000 --factory IVF4096,SQ8 --dimension 768 --memory 32GiB
    """
    from retriever_service.building.calibration import calibrate
    from retriever_service.building.planner import PASSAGE_BYTES, check_fits, plan_index
    from retriever_service.encoding.encoder import Encoder, EncoderSpec
    from retriever_service.passages.corpus import passage_text, read_corpus

    sample = list(islice(read_corpus(corpus), _PROBED_PASSAGES)) if corpus else []
    loaded = Encoder.load(EncoderSpec(encoder)) if sample else None
    if loaded is not None:
        dimension = loaded.dimension
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    planned = plan_index(
        passages,
        dimension,
        factory,
        memory_bytes=memory,
        bm25=bm25,
        passage_bytes=sum(len(passage_text(p).encode()) for p in sample) / len(sample)
        if sample
        else PASSAGE_BYTES,
        calibration=calibrate(factory, dimension, existing, encoder=loaded, passages=sample),
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(planned)))
    else:
        for name, value in dataclasses.asdict(planned).items():
            if name.endswith("_bytes") and value is not None:
                say(f"{name.removesuffix('_bytes').replace('_', ' '):>20}  {value / 1e9:10.3f} GB")
        say(f"{'segments':>20}  {len(planned.segments):10}")
        for name, value in dataclasses.asdict(planned)["seconds"].items():
            if value is not None:
                say(f"{name:>20}  {value:10.0f} s")
    check_fits(planned, out, memory)


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


@app.command()
def add(
    index: IndexDir,
    corpus: CorpusSources,
    as_json: AsJson = False,
) -> None:
    """Add passages to an index without building it again; servers of it take them up.

    Reads the whole index first, and leaves a damaged one alone.

    Example: exsearch index add --index index --corpus new.jsonl
    """
    from retriever_service.encoding.encoder import Encoder
    from retriever_service.index.store import read_manifest
    from retriever_service.index.updates import add_passages
    from retriever_service.passages.corpus import read_corpus

    passages = list(read_corpus(corpus))
    encoder = Encoder.load(read_manifest(index).encoder)
    manifest = add_passages(index, passages, encoder, verify=True)
    _report_update(index, manifest.num_passages, {"added": len(passages)}, as_json)


@app.command()
def delete(
    index: IndexDir,
    ids: Annotated[list[str], typer.Argument(help="Ids of passages.")],
    as_json: AsJson = False,
) -> None:
    """Delete passages from an index without building it again; servers of it leave them out.

    Reads the whole index first, and leaves a damaged one alone.

    Example: exsearch index delete --index index p17 p18
    """
    from retriever_service.index.updates import delete_passages

    manifest = delete_passages(index, ids, verify=True)
    _report_update(index, manifest.num_passages, {"deleted": len(set(ids))}, as_json)


@app.command()
def info(
    index: IndexDir,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
) -> None:
    """Print the manifest of an index, without its list of files.

    Example: exsearch index info --index index --verify
    """
    from retriever_service.index.store import read_manifest, verify_checksums

    manifest = read_manifest(index)
    if verify:
        verify_checksums(index)
    described = dataclasses.asdict(manifest) | {"fingerprint": manifest.fingerprint}
    del described["files"]
    typer.echo(json.dumps(described, indent=2, ensure_ascii=False))


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


def _report_update(index: Path, num_passages: int, change: dict[str, int], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"passages": num_passages} | change))
    else:
        ((what, number),) = change.items()
        say(f"{index}: {what} {number:,}, {num_passages:,} passages now")


def main() -> None:
    """Entry point of `python -m retriever_service`."""
    app()
