"""From a corpus to an index: encode, build, import, plan."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from retriever_service.cli.program import app
from retriever_service.console import (
    AsJson,
    CorpusSources,
    Device,
    EncoderDtype,
    EncoderName,
    Factory,
    MaxTokens,
    Memory,
    Normalise,
    Out,
    PassagePrefix,
    PassageTemplate,
    QueryPrefix,
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

_PROBED_PASSAGES = 256


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
