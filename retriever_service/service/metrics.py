"""What a server did, for Prometheus. One registry per server, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retriever_service.service.batching import BatchingSearcher
from retriever_service.service.cache import CachingSearcher

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class HttpMetrics:
    """Counters and histograms of one server's requests. Any thread may call any method.

    Args:
        buckets: of the time that requests take, in seconds.
    """

    def __init__(self, buckets: Sequence[float] = _SECONDS) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "exsearch_requests", "HTTP requests answered.", ["route", "status"], registry=self._registry
        )
        self._request_s = Histogram(
            "exsearch_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=buckets,
            registry=self._registry,
        )
        self._errors = Counter("exsearch_errors", "Failed requests.", ["kind"], registry=self._registry)
        self.ready = Gauge("exsearch_ready", "1 if queries are answered.", registry=self._registry)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def note_request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, status).inc()
        self._request_s.labels(route).observe(seconds)

    def note_error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def render(self) -> bytes:
        """In Prometheus's text format, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)


class Metrics(HttpMetrics):
    """Those of a retrieval server."""

    def __init__(self) -> None:
        super().__init__()
        self._batch = Histogram(
            "exsearch_batch_queries", "Queries per batch.", buckets=_QUERIES, registry=self._registry
        )
        self._batch_s = Histogram(
            "exsearch_batch_seconds",
            "The whole search of a batch.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stage_s = Histogram(
            "exsearch_stage_seconds",
            "One stage of a search: encode, search, rerank, fetch.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def watch(self, batcher: BatchingSearcher[Any], cache: CachingSearcher) -> None:
        """Report on these too; once per server."""
        self._registry.register(_QueueCollector(batcher, cache))

    def note_batch(self, num_queries: int, seconds: float) -> None:
        self._batch.observe(num_queries)
        self._batch_s.observe(seconds)

    def note_stage(self, stage: str, seconds: float) -> None:
        self._stage_s.labels(stage).observe(seconds)


class _QueueCollector(Collector):
    """Reads what batcher and cache count anyway, when somebody looks."""

    def __init__(self, batcher: BatchingSearcher[Any], cache: CachingSearcher) -> None:
        self._batcher = batcher
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "exsearch_queue_queries", "Queries that wait for the next batch.", self._batcher.waiting
        )
        stats = self._cache.stats()
        queries = CounterMetricFamily(
            "exsearch_queries",
            "Queries by where their answer came from: kept, shared with an equal one in flight, searched.",
            labels=["source"],
        )
        for source, count in (("kept", stats.kept), ("shared", stats.shared), ("searched", stats.searched)):
            queries.add_metric([source], count)
        yield queries
