"""Coroutines in a thread of their own: results, errors, and what an interrupt leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from actors.background import Background


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


def test_several_go_on_at_once_beside_the_caller(background: Background) -> None:
    """Each waits for what the other and the caller do."""
    met = threading.Event()

    async def first(ready: asyncio.Event) -> str:
        ready.set()
        await asyncio.to_thread(met.wait)
        return "first"

    async def second(ready: asyncio.Event) -> str:
        await ready.wait()
        return "second"

    ready = asyncio.Event()
    ongoing = background.begin(first(ready)), background.begin(second(ready))
    assert ongoing[1].result() == "second"
    met.set()
    assert ongoing[0].result() == "first"


def test_an_error_is_raised_where_the_result_is_asked_for(background: Background) -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    ongoing = background.begin(fails())
    with pytest.raises(ZeroDivisionError):
        ongoing.result()
    ongoing.cancel()  # nothing to do


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_what_is_cancelled_has_put_away_what_it_holds(background: Background, how: str) -> None:
    put_away, begun = [], threading.Event()

    async def endless() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            put_away.append(True)

    ongoing = background.begin(endless())
    begun.wait()
    if how == "cancel":
        ongoing.cancel()
    else:
        background.close()
    assert put_away
    with pytest.raises(CancelledError):
        ongoing.result()


def test_one_that_had_no_time_to_begin_can_be_cancelled(background: Background) -> None:
    async def blocks() -> None:
        threading.Event().wait(0.2)

    background.begin(blocks())
    late = background.begin(asyncio.sleep(3600))
    late.cancel()
    with pytest.raises(CancelledError):
        late.result()


def test_an_interrupt_while_the_result_is_waited_for_ends_it(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_away = []

    async def endless() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            put_away.append(True)

    def interrupted() -> None:
        raise KeyboardInterrupt

    ongoing = background.begin(endless())
    background.begin(asyncio.sleep(0)).result()  # it has begun
    monkeypatch.setattr(ongoing._future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ongoing.result()
    assert put_away
