"""What is counted of an engine, and what is made of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from actors.cluster import _used_since
from actors.engine_options import agents_that_fit
from actors.engine_use import EngineUse, UseCounter


def stats(queries: int, hits: int) -> Any:
    return SimpleNamespace(prefix_cache_stats=SimpleNamespace(queries=queries, hits=hits))


def test_steps_add_up() -> None:
    counter = UseCounter()
    counter.record(stats(100, 0), SimpleNamespace(num_preempted_reqs=0))
    counter.record(stats(300, 240), SimpleNamespace(num_preempted_reqs=2))
    counter.record(None, None)

    assert counter.use == EngineUse(prompt_tokens=400, cached_tokens=240, preemptions=2)
    assert counter.use.figures() == {"prompt_tokens": 400, "cache_hits": 60.0, "preemptions": 2}


def test_an_engine_that_did_nothing_has_no_hits() -> None:
    assert EngineUse().cache_hits == 0.0


class Pool:
    name = "searcher"

    def __init__(self, **uses: EngineUse) -> None:
        self.uses = lambda: uses


def test_a_phase_has_what_was_done_in_it_by_the_workers_that_are_left_or_came(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = {"searcher": {"stayed": EngineUse(100, 50), "died": EngineUse(100, 50)}}
    pool: Any = Pool(stayed=EngineUse(150, 90), came=EngineUse(20, 0))

    assert _used_since(before, {"searcher": pool}) == {"searcher": EngineUse(70, 40)}
    assert caplog.text == ""


def test_preemptions_are_said(caplog: pytest.LogCaptureFixture) -> None:
    pool: Any = Pool(stayed=EngineUse(150, 90, 3))

    with caplog.at_level(logging.WARNING):
        _used_since({"searcher": {}}, {"searcher": pool})
    assert "3 requests to the engines of searcher were thrown out of a full KV cache" in caplog.text


@pytest.mark.parametrize(("tokens", "fit"), [(348_000, 84), (722_000, 176), (100, 1)])
def test_agents_fit_at_half_of_the_greatest_length(tokens: int, fit: int) -> None:
    assert agents_that_fit(tokens, 8_192) == fit
