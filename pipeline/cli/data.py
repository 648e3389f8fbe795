"""Questions, corpora and vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, ConfigFile, Overrides, data_app, loading
from retriever_service.cli import app as index_app
from retriever_service.console import (
    CorpusSources,
    EncoderDtype,
    EncoderName,
    MaxTokens,
    Out,
    PassagePrefix,
    QueryPrefix,
    VectorsDtype,
    encoder_spec,
)


@data_app.command("check")
def check_data(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Leaks, doubles and evidence coverage: is trained on what is asked later, does the corpus hold the answers?

    Example: exsearch data check data.train=train.jsonl data.dev=dev.jsonl data.corpus=corpus.jsonl
    """
    with loading() as display:
        from rich.console import Console

        from pipeline.commands import data
        from pipeline.methods import load

    found = data.check_data(load(config, overrides or []), display)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        data.print_check(found, Console())


@data_app.command("fetch")
def fetch_data(
    name: Annotated[
        str,
        typer.Argument(help="hotpotqa, 2wikimultihopqa, musique, nq, triviaqa, popqa or bamboogle."),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write: new, empty, or begun by this command.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Folder with a copy, or hf:NAME[:CONFIG] (default: its place on the hub)."
        ),
    ] = None,
) -> None:
    """A data set in our files, with its passages where it brings some. Killed or interrupted, the same command goes on.

    A copy may be the authors' own files, the hub's Parquet files, a saved data set, or FlashRAG's layout.

    Example: exsearch data fetch hotpotqa --out data/hotpotqa
    """
    with loading() as display:
        from pipeline.commands.data import fetch

    typer.echo(json.dumps(fetch(name, out, source, display), ensure_ascii=False))


@index_app.command("encode-with-ray")
def encode_with_ray(
    corpus: CorpusSources,
    out: Out,
    encoder: EncoderName = "minilm",
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    max_tokens: MaxTokens = None,
    encoder_dtype: EncoderDtype = None,
    dtype: VectorsDtype = "float32",
    actors: Annotated[
        int | None,
        typer.Option(help="Encoders (default: one per GPU of the cluster, without GPUs per core)."),
    ] = None,
) -> None:
    """As `encode`, on the devices of a Ray cluster; the directory must be on a path that all its nodes see.

    Killed or interrupted, the same command goes on. RAY_ADDRESS names the cluster.

    Example: exsearch index encode-with-ray --corpus wiki.jsonl --encoder intfloat/e5-base-v2 --out wiki-vectors
    """
    with loading() as display:
        from pipeline.commands.encode import encode_on_cluster

    spec = encoder_spec(encoder, query_prefix, passage_prefix, max_tokens, encoder_dtype)
    store = encode_on_cluster(corpus, out, spec, display, num_actors=actors, store_dtype=dtype)
    display.line(f"{out}: {store.manifest.count:,} passages, {store.manifest.dimension} dimensions, {dtype}")
