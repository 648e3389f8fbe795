"""What a server of answers did, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from pipeline.core.records import StopReason, Trajectory
from pipeline.serve.told import usage_of
from retriever_service.service.metrics import HttpMetrics

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServeMetrics(HttpMetrics):
    """Beside those of its requests."""

    def __init__(self) -> None:
        super().__init__(_SECONDS)
        registry = self._registry
        self.in_flight = Gauge("exsearch_answers_in_flight", "Answers being made.", registry=registry)
        self.waiting = Gauge("exsearch_answers_waiting", "Answers that wait for room.", registry=registry)
        self.version = Gauge(
            "exsearch_model_version", "Version of the model that answers.", registry=registry
        )
        self.reloads = Counter("exsearch_reloads", "Newer models that were loaded.", registry=registry)
        self.restarts = Counter(
            "exsearch_engine_restarts",
            "Starts of another engine in the place of a lost one.",
            registry=registry,
        )
        self._answers = Counter(
            "exsearch_answers", "Answers by why they ended.", ["stop_reason"], registry=registry
        )
        self._tokens = Counter(
            "exsearch_tokens", "Tokens that the agent read and wrote.", ["kind"], registry=registry
        )
        self._searches = Counter("exsearch_searches", "Searches of answers.", registry=registry)
        for reason in StopReason:
            self._answers.labels(reason.value)

    def note_answer(self, trajectory: Trajectory) -> None:
        """One that ended, however it did."""
        usage = usage_of(trajectory)
        self._answers.labels(trajectory.stop_reason.value).inc()
        self._tokens.labels("prompt").inc(usage.prompt)
        self._tokens.labels("completion").inc(usage.completion)
        self._searches.inc(trajectory.num_searches)
