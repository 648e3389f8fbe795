"""The retriever of a run, from the configuration's point of view: an index, or servers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import faiss
import httpx
import torch

from pipeline.core.config import DataConfig, RetrieverConfig
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.noise import depth_with_noise
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import Encoder, EncoderSpec
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.index.store import Manifest, check_encoder, open_index, read_manifest
from retriever_service.machine import available_cores
from retriever_service.passages.corpus import Passage, read_corpus
from retriever_service.passages.hits import SearchOptions
from retriever_service.service.client import RetrieverHttpClient
from retriever_service.service.settings import TOKEN_VARIABLE

POLL_S = 2.0
"""Between two looks at a server that is not ready yet."""

_PROBE = "first search"


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of `retriever.url`: replicas of one retriever, which answered when they were looked at."""

    clients: tuple[RetrieverHttpClient, ...]
    """One per address; each makes a single attempt per search."""
    fingerprint: str
    """Of what all of them search; Search-R1 servers have none to tell."""


Searched = Path | Servers
"""Where the passages come from: a built index, or servers."""


def encoder_spec(retriever: RetrieverConfig) -> EncoderSpec:
    """The encoder that the configuration asks for."""
    return EncoderSpec(
        model=retriever.encoder,
        query_prefix=retriever.query_prefix,
        passage_prefix=retriever.passage_prefix,
        max_length=retriever.max_tokens,
        dtype=retriever.encoder_dtype,
    )


def corpus_paths(data: DataConfig) -> list[str]:
    """`data.corpus` with `data.root` in front of relative paths."""
    root = Path(data.root)
    return [source if source.startswith("hf:") else str(root / source) for source in data.corpus]


def await_servers(
    retriever: RetrieverConfig, display: Display, *, documents: int, timeout_s: float
) -> Servers | None:
    """The servers of `retriever.url`, once each has answered a search; None where it is null.

    A server that answers "not now", as ours does while it loads, is waited for. One that gives no answer at all is an
    error at once: its address is the likelier reason.

    Args:
        documents: as many passages as will be asked for: a server may have a limit.
        timeout_s: the longest wait, in seconds (`cluster.start_timeout_s`).

    Raises:
        UserError: a server that does not answer, or not as one of this dialect, or not with this token; servers of
            different indexes.
        RetrieverError: an address that is none, or a proxy that cannot be gone through.
    """
    if retriever.url is None:
        return None
    clients = tuple(
        RetrieverHttpClient(
            url,
            retriever.dialect,
            timeout_s=retriever.timeout_s,
            max_attempts=1,
            token=os.environ.get(TOKEN_VARIABLE) or None,
        )
        for url in retriever.url
    )
    deadline = time.monotonic() + timeout_s
    depth = depth_with_noise(documents, retriever.noise)
    with display.status(f"waiting for the retriever at {', '.join(retriever.url)}"):
        fingerprints = {
            client.url: _await_answer(client, depth, retriever.options, display, deadline)
            for client in clients
        }
    if retriever.dialect == "search-r1":
        return Servers(clients, "search-r1")
    if len(set(fingerprints.values())) > 1:
        lines = "\n".join(f"  {url}: {fingerprint}" for url, fingerprint in fingerprints.items())
        raise UserError(
            f"the servers of retriever.url search different indexes:\n{lines}\nLet all serve one."
        )
    return Servers(clients, next(iter(fingerprints.values())))


def _await_answer(
    client: RetrieverHttpClient, documents: int, options: SearchOptions, display: Display, deadline: float
) -> str:
    """The fingerprint of a server, once it has answered a search; see `await_servers`."""
    told = False
    while True:
        try:
            client.search([_PROBE], documents, options)
            return client.fingerprint
        except RetrieverUnavailable as error:
            unreachable = isinstance(error.__cause__, httpx.RequestError)
            if unreachable or time.monotonic() >= deadline:
                mend = "start it, or correct the address" if unreachable else "see its log"
                raise UserError(f"retriever.url: {error}; {_past_the_proxy(client) or mend}") from error
            if not told:
                display.line(f"{client.url} is not ready yet: {error.__cause__}")
                told = True
        except RetrieverError as error:
            looked_at = (
                "look at the address (http://HOST:PORT, without the route), at "
                f"retriever.dialect ({client.dialect}) and at the token in {TOKEN_VARIABLE}"
            )
            raise UserError(f"retriever.url: {error}; {_past_the_proxy(client) or looked_at}") from error
        time.sleep(POLL_S)


def _past_the_proxy(client: RetrieverHttpClient) -> str:
    """The mend where a proxy may be what answers, or does not."""
    return f"if {client.url} needs no proxy, name its host in no_proxy" if client.proxy else ""


def passages(data: DataConfig, searched: Searched) -> Iterable[Passage]:
    """All passages, to find gold ones by their id: those of the index; for servers those of `data.corpus`.

    Raises:
        RetrieverError: a damaged index; while iterating, a bad corpus.
    """
    return open_index(searched).corpus if isinstance(searched, Path) else read_corpus(corpus_paths(data))


def searchable(retriever: RetrieverConfig, index: Path) -> Manifest:
    """What a built index says of itself, once it is known to have what `retriever.method` needs.

    Raises:
        UserError, RetrieverError: it has no words; no index.
    """
    manifest = read_manifest(index)
    if retriever.method != "dense" and manifest.bm25 is None:
        raise UserError(
            f"retriever.method: {retriever.method} needs an index of words, and {index} has none; build it again with "
            "`exsearch index build --bm25`, or set retriever.method: dense"
        )
    return manifest


def prepare_index(retriever: RetrieverConfig, data: DataConfig, default: Path, display: Display) -> Path:
    """The directory of the index to search, where no servers are: the configured one, else one built from the corpus
    at `default`.

    Raises:
        UserError, RetrieverError: no corpus and no index, a bad corpus, or an index of another encoder or without the
            words that `retriever.method` needs.
    """
    spec = encoder_spec(retriever)
    if retriever.index is not None:
        index = Path(retriever.index)
        manifest = searchable(retriever, index)
        if not _asks_for_nothing_else(spec, manifest.encoder):
            # Under another name it may still be the same encoder: a copy in another directory.
            check_encoder(manifest, Encoder.load(spec), index)
        return index
    if not data.corpus:
        raise UserError(
            "there is nothing to search: set data.corpus, or retriever.index to a built index, or "
            "retriever.url to a server"
        )
    # Not what is fastest here: the same command is to give the same run on every machine.
    spec = replace(spec, dtype=spec.dtype or "float32")
    with display.progress("preparing the index", None, "passages") as advance:
        build_run_index(retriever, corpus_paths(data), default, spec, advance.to)
    return default


def build_run_index(
    retriever: RetrieverConfig,
    corpus: Sequence[str],
    at: Path,
    spec: EncoderSpec,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build the configured kind of index, or go on with what was begun at `at`.

    Raises:
        RetrieverError: a mistake in the corpus or the encoder.
    """
    # In a job of Ray's, OMP_NUM_THREADS is 1.
    faiss.omp_set_num_threads(available_cores())
    build_index(
        corpus,
        at,
        spec,
        factory=retriever.factory,
        bm25=retriever.method != "dense",
        # This process may be on a node without GPUs, whatever the retriever actors have.
        device=retriever.torch_device if torch.cuda.is_available() else "cpu",
        on_progress=on_progress,
    )


def what_is_searched(
    retriever: RetrieverConfig,
    data: DataConfig,
    default: Path,
    display: Display,
    *,
    documents: int,
    timeout_s: float,
) -> Searched:
    """The servers, or the index, of a configuration; see `await_servers` and `prepare_index`."""
    servers = await_servers(retriever, display, documents=documents, timeout_s=timeout_s)
    return servers or prepare_index(retriever, data, default, display)


def _asks_for_nothing_else(asked: EncoderSpec, built: EncoderSpec) -> bool:
    """True if every setting is left open or is the one that the index was built with."""
    return all(value in (None, asdict(built)[name]) for name, value in asdict(asked).items())
