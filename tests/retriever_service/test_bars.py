"""Progress where no terminal shows it: lines now and then, of what is counted and of what is only waited for."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from retriever_service import bars as module
from retriever_service.bars import Bars


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.02)


def said(work: Callable[[Bars], None], **options: bool) -> list[str]:
    """The lines while there is work of a tenth of a second."""
    file = io.StringIO()
    with Bars(console=Console(file=file, width=40, **options)) as bars:  # type: ignore[arg-type]
        work(bars)
        time.sleep(0.1)
    return [line for line in file.getvalue().splitlines() if line]


def test_what_is_counted_is_said_with_the_time_it_takes_and_in_one_line() -> None:
    def work(bars: Bars) -> None:
        task = bars.add_task("indexing", total=20_000, unit="passages of a long name")
        for _ in range(2):
            time.sleep(0.01)
            bars.advance(task, 1_000)

    lines = said(work)
    pattern = r"indexing: [12],000 of 20,000 passages of a long name, \d:\d\d:\d\d so far(, about \d:\d\d:\d\d left)?"
    assert len(lines) > 1 and all(re.fullmatch(pattern, line) for line in lines)
    assert "left" in lines[-1]


def test_what_is_waited_for_is_said_too_and_nothing_when_it_is_over() -> None:
    def work(bars: Bars) -> None:
        task = bars.add_task("starting [two] engines", total=None, unit=None)
        time.sleep(0.05)
        bars.remove_task(task)

    lines = said(work)
    assert set(lines) == {"starting [two] engines: 0:00:00 so far"} and len(lines) < 4


def test_a_terminal_gets_bars_alone() -> None:
    lines = said(
        lambda bars: bars.add_task("indexing", total=2, unit="passages") and None, force_terminal=True
    )
    assert not any("so far" in line for line in lines)
