"""What a run counts, for a Prometheus that scrapes Ray's nodes: Ray exports it from each of them.

Ray puts `ray_` in front of the names, and labels of its own (node, process, session) beside those below. Processes
record per episode, search, batch or optimiser step, never per token; to record takes some microseconds. What is done
twice, since it was lost in between, counts twice: the run's own files have every trajectory and step once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Generic, TypeVar

import ray
from ray.util import metrics as ray_metrics

M = TypeVar("M")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

KEEP_EVERY_S = 5.0
"""How often gauges are set again, in seconds: more often than Ray's processes report."""

_own: dict[str, str] = {}


def belongs_to(**labels: str) -> None:
    """All that this process records from now on is of this run, policy and actor; without any it records nothing."""
    _own.clear()
    _own.update(labels)
    _Keeper.kept.clear()


class Metric(Generic[M]):
    """A metric by its name. A label that a call does not give is that of the process (`belongs_to`), or empty."""

    known: ClassVar[dict[str, Metric[Any]]] = {}
    """All of them, by name."""
    _of: ClassVar[Any]
    """What it is in Ray."""
    exposed_as: ClassVar[tuple[str, ...]] = ("",)
    """What Prometheus has behind the name."""

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name, self.help, self.labels = f"exsearch_{name}", help, ("run", *labels)
        self.known[self.name] = self

    @cached_property
    def _ray(self) -> M:
        return self._make(self.name, self.help, self.labels)

    def _make(self, name: str, help: str, labels: tuple[str, ...]) -> M:
        made: M = self._of(name, help, tag_keys=labels)
        return made

    def _tags(self, given: Mapping[str, str]) -> dict[str, str]:
        return {label: given.get(label, _own.get(label, "")) for label in self.labels}


class Counter(Metric[ray_metrics.Counter]):
    """Only grows."""

    _of = ray_metrics.Counter
    exposed_as = ("_total",)

    def add(self, amount: float = 1, **labels: str) -> None:
        if _own and amount > 0:
            self._ray.inc(amount, self._tags(labels))


class _Keeper(threading.Thread):
    """Sets the gauges of this process again and again: Ray exports one once each time that it is set."""

    kept: ClassVar[dict[tuple[Any, ...], Callable[[], None]]] = {}
    """What sets the last value, by the gauge and its labels."""
    _started: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def keep(cls, gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        cls.kept[gauge.name, *tags.items()] = partial(gauge._ray.set, value, tags)
        if cls._started.acquire(blocking=False):
            cls(name="gauges", daemon=True).start()

    def run(self) -> None:
        while True:
            time.sleep(KEEP_EVERY_S)
            if ray.is_initialized():
                for set_again in list(self.kept.values()):
                    set_again()


class Gauge(Metric[ray_metrics.Gauge]):
    """What is so now."""

    _of = ray_metrics.Gauge

    def set(self, value: float, **labels: str) -> None:
        if _own:
            tags = self._tags(labels)
            self._ray.set(value, tags)
            _Keeper.keep(self, value, tags)


class Histogram(Metric[ray_metrics.Histogram]):
    """How large things are. Ray passes on in which bucket each value fell: `_sum` is as exact as that."""

    exposed_as = ("_bucket", "_sum", "_count")

    def __init__(self, name: str, help: str, *labels: str, bounds: Sequence[float] = _SECONDS) -> None:
        super().__init__(name, help, *labels)
        self._bounds = list(bounds)

    def _make(self, name: str, help: str, labels: tuple[str, ...]) -> ray_metrics.Histogram:
        return ray_metrics.Histogram(name, help, self._bounds, labels)

    def observe(self, value: float, **labels: str) -> None:
        if _own:
            self._ray.observe(value, self._tags(labels))


def exposed_names() -> set[str]:
    """All names that Prometheus may have of a run."""
    return {f"ray_{metric.name}{end}" for metric in Metric.known.values() for end in metric.exposed_as}


# ---------------------------------------------------------------- the driver

TASKS = Gauge(
    "tasks",
    "Questions of the phase: waiting, in flight (also what was lost with a worker), done.",
    "phase",
    "state",
)
LOST = Counter("actors_lost", "Actors that died, hung or missed a version.", "kind", "policy")
RESTARTS = Counter(
    "actor_restarts", "Actors that took the place of a lost one, and are at work.", "kind", "policy"
)
PUSHES = Counter(
    "pushes",
    "Versions brought to the engines: sent by the learner, or loaded from disk; failed ones are then loaded.",
    "policy",
    "way",
)
PUSH_MISSED = Counter("push_missed", "Engines that missed a push.", "policy")
PUSH_SECONDS = Counter(
    "push_seconds", "Of pushes by the learner, from their first to their last word.", "policy"
)
PUSH_BYTES = Counter("push_bytes", "Weights sent to each engine, in bytes.", "policy")

# ---------------------------------------------------------------- rollout workers

IN_FLIGHT = Gauge("episodes_in_flight", "Episodes that a worker has begun and not ended.", "policy", "actor")
EPISODES = Counter(
    "episodes",
    "Episodes that ended, by the stop reason of their failed or else their last turn.",
    "policy",
    "phase",
    "reason",
)
PROMPT_TOKENS = Counter("prompt_tokens", "Tokens of prompts that engines looked up in their cache.", "policy")
CACHED_TOKENS = Counter("cached_prompt_tokens", "Of them those that were found there.", "policy")
PREEMPTIONS = Counter(
    "preemptions", "Requests that were thrown out of a full cache and computed again.", "policy"
)
GENERATED_TOKENS = Counter("generated_tokens", "Tokens in the episodes that ended.", "policy", "phase")
SEARCHES = Counter(
    "searches", "Searches by their outcome: found, or the kind of the failure.", "policy", "phase", "outcome"
)
SEARCH_SECONDS = Histogram(
    "search_seconds", "A search as a program waits for it, further attempts included.", "policy"
)
VERSION = Gauge(
    "weight_version",
    "Version of the weights that a worker serves; -1 while it serves nothing.",
    "policy",
    "actor",
)

# ---------------------------------------------------------------- retriever replicas, named as those of a server are

QUERIES = Counter("queries", "Queries that were searched for.", "actor")
QUEUE = Gauge("queue_queries", "Queries that waited for the next batch when the last one was done.", "actor")
BATCH_QUERIES = Histogram("batch_queries", "Queries per batch.", "actor", bounds=_QUERIES)
BATCH_SECONDS = Histogram("batch_seconds", "The whole search of a batch.", "actor")

# ---------------------------------------------------------------- the weighting actor

WEIGHED = Counter("weighed_episodes", "Episodes that the weighting actor took.")
EXCLUDED = Counter(
    "excluded_episodes",
    "Episodes that nothing is trained on: infrastructure failed, or too long to score.",
    "reason",
)
SHARDS = Counter("shards", "Shards that were written.")
SHARD_SECONDS = Counter("shard_seconds", "For which they were written.")

# ---------------------------------------------------------------- the learner's rank 0

STEPS = Counter("optimizer_steps", "Optimiser steps, those without a finite gradient too.", "policy")
SKIPPED = Counter("skipped_steps", "Optimiser steps that were left out: no finite gradient.", "policy")
TRAINED_TOKENS = Counter("trained_tokens", "Tokens that the loss of these steps is taken over.", "policy")
TRAINING_DONE = Gauge("training_done", "Share of the optimiser steps of the phase that are done.", "policy")
LOSS = Gauge("loss", "Of the last optimiser step.", "policy")
GRADIENT_NORM = Gauge("gradient_norm", "Of the last optimiser step, before clipping.", "policy")
CHECKPOINTS = Counter("checkpoints", "Checkpoints that were written.", "policy")
CHECKPOINT_SECONDS = Counter(
    "checkpoint_seconds", "For which they, and models with them, held up the learner.", "policy"
)
