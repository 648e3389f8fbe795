"""What is recorded, under which labels; Ray's own objects are stand-ins."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from actors import metrics
from actors.observer import Observer
from actors.rollout import RolloutWorker
from pipeline.core.progress import ActorKind
from retriever_service.errors import RetrieverError, RetrieverUnavailable

Recorded = Counter[tuple[str, ...]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Sums by name and labels, those that are empty left out."""
    sums: Recorded = Counter()

    def made(self: Any, name: str, help: str, labels: tuple[str, ...]) -> Any:
        def add(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == labels  # Ray refuses others
            sums[name, *(text for text in tags.values() if text)] += value  # type: ignore[assignment]

        return SimpleNamespace(inc=add, set=add, observe=add)

    for kind in (metrics.Counter, metrics.Gauge, metrics.Histogram):
        monkeypatch.setattr(kind, "_make", made)
    for metric in metrics.Metric.known.values():
        monkeypatch.delitem(metric.__dict__, "_ray", raising=False)
    yield sums
    metrics.belongs_to()
    for metric in metrics.Metric.known.values():
        metric.__dict__.pop("_ray", None)


def test_a_process_of_no_run_records_nothing(recorded: Recorded) -> None:
    metrics.STEPS.add()
    metrics.LOSS.set(1.0)
    metrics.SEARCH_SECONDS.observe(1.0)
    assert recorded == {}


def test_labels_are_those_of_the_process_unless_a_call_gives_others(recorded: Recorded) -> None:
    metrics.belongs_to(run="demo", policy="searcher", actor="rollout-searcher-0")
    metrics.EPISODES.add(2, phase="sample", reason="answered")
    metrics.LOST.add(kind="rollout", policy="other")
    metrics.SKIPPED.add(0)
    assert recorded == {
        ("exsearch_episodes", "demo", "searcher", "sample", "answered"): 2,
        ("exsearch_actors_lost", "demo", "rollout", "other"): 1,
    }


def test_a_search_counts_by_how_it_ended(recorded: Recorded) -> None:
    metrics.belongs_to(run="demo", policy="searcher")
    worker = object.__new__(RolloutWorker)
    ends: list[Any] = [[], RetrieverUnavailable("down"), RetrieverError("odd"), RetrieverError("odd")]

    async def search(query: str, k: int) -> Any:
        if isinstance(end := ends.pop(0), Exception):
            raise end
        return end

    worker.retriever = SimpleNamespace(search=search)  # type: ignore[assignment]
    for error in (None, RetrieverUnavailable, RetrieverError, RetrieverError):
        if error is None:
            asyncio.run(worker._search("sample", "who?", 2))
            continue
        with pytest.raises(error):
            asyncio.run(worker._search("sample", "who?", 2))
    outcomes = {key[-1]: count for key, count in recorded.items() if key[0] == "exsearch_searches"}
    assert outcomes == {"found": 1, "unavailable": 1, "bad_answer": 2}


def test_what_was_lost_and_restarted_is_counted_and_told(recorded: Recorded, tmp_path: Any) -> None:
    told: list[ActorKind] = []
    observer = Observer(tmp_path / "demo", told.append)
    observer.lost("learner", "searcher")
    observer.restarted("learner", "searcher")
    assert told == ["learner"]
    assert recorded["exsearch_actors_lost", "demo", "learner", "searcher"] == 1
    assert recorded["exsearch_actor_restarts", "demo", "learner", "searcher"] == 1
    observer.close()
    observer.lost("learner", "searcher")
    assert recorded["exsearch_actors_lost", "demo", "learner", "searcher"] == 1
