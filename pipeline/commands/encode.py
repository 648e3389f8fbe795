"""Encode a corpus with the devices of a Ray cluster, for `exsearch index build --vectors`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray

from actors.encoding import encode_with_actors
from actors.session import ray_session
from pipeline.core.config import ClusterConfig
from pipeline.core.display import Display
from retriever_service.choices import StoreDtype
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.encoding.vectors import VectorStore


def encode_on_cluster(
    corpus: Sequence[str],
    out: Path,
    spec: EncoderSpec,
    display: Display,
    *,
    num_actors: int | None = None,
    store_dtype: StoreDtype = "float32",
) -> VectorStore:
    """Encode with an actor per GPU of the cluster; where it has none, with one per core.

    Args:
        out: on a path that all nodes see.
        num_actors: fewer, or more if nodes are still to join.

    Raises:
        RetrieverError, RetrieverUnavailable: see `encode_with_actors`.
    """
    with ray_session(ClusterConfig(), display.line):
        resources = ray.cluster_resources()
        device, of_them = ("cuda", "GPU") if resources.get("GPU") else ("cpu", "CPU")
        with display.progress("encoding", None, "passages") as advance:
            return encode_with_actors(
                corpus,
                out,
                spec,
                num_actors=num_actors or int(resources[of_them]),
                device=device,
                store_dtype=store_dtype,
                on_progress=advance.to,
            )
