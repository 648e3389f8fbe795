"""What an index holds: add, delete, info."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from retriever_service.cli.program import app
from retriever_service.console import (
    AsJson,
    CorpusSources,
    IndexDir,
    say,
)


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


def _report_update(index: Path, num_passages: int, change: dict[str, int], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"passages": num_passages} | change))
    else:
        ((what, number),) = change.items()
        say(f"{index}: {what} {number:,}, {num_passages:,} passages now")
