"""One process at a time writes to a copy, and takes it over from one that is gone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import Config, StorageConfig
from pipeline.core.errors import UserError
from pipeline.core.mirror import mirror as module
from pipeline.core.mirror.mirror import Mirror
from pipeline.core.mirror.restore import restore
from pipeline.core.mirror.store import Store
from pipeline.opening import _opened
from tests.pipeline.core.mirror.support import Process, contents, copied, do_work, until


def test_two_processes_do_not_write_to_one_url(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    first = Process(tmp_path / "here", url)
    with pytest.raises(
        UserError, match=r"belongs to another process .*wait for it, or choose another storage\.url"
    ):
        Process(tmp_path / "there", url)
    first.end()


def test_what_a_killed_process_left_is_taken_over(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Process(tmp_path / "here", url)
    until(lambda: bool(copied(url)))
    first.die()
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.core.mirror.lease.LEASE_S", 1000.0)
        again = Process(tmp_path / "here", url)  # by the same directory at once
    again.die()
    Process(tmp_path / "there", url).end()  # by another one when it gives no sign of life
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_process_that_restores_for_long_keeps_the_url(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    first = Process(tmp_path / "gone", url)
    do_work(first.files, 0)
    first.end()
    began, goes_on = threading.Event(), threading.Event()

    def long(*arguments: Any) -> Any:
        began.set()
        goes_on.wait(20)
        return restore(*arguments)

    monkeypatch.setattr(module, "restore", long)
    with ThreadPoolExecutor(1) as thread:
        restoring = thread.submit(Process, tmp_path / "here", url)
        assert began.wait(20)
        with pytest.raises(UserError, match="belongs to another process"):
            Process(tmp_path / "there", url)
        goes_on.set()
        restoring.result().end()
    assert contents(tmp_path / "here") == contents(tmp_path / "gone")


def test_a_process_that_is_refused_leaves_the_url_to_others(tmp_path: Path, url: str) -> None:
    Process(tmp_path / "here", url).end()
    Process(tmp_path / "there", url).end()
    with pytest.raises(UserError, match="went on in another directory"):
        Process(tmp_path / "here", url)
    assert Store(url).read("lease.json") is None


def test_a_process_that_is_refused_for_its_configuration_does_so_too(tmp_path: Path, url: str) -> None:
    first = Process(tmp_path / "here", url)
    do_work(first.files, 0)
    first.end()
    other = Config(storage=StorageConfig(url=url), seed=1)
    with (
        pytest.raises(UserError, match="another configuration"),
        _opened(tmp_path / "new", other, Mirror(tmp_path / "new", url)),
    ):
        pass
    assert Store(url).read("lease.json") is None


def test_a_process_that_was_taken_for_dead_does_not_write_any_more(tmp_path: Path, url: str) -> None:
    first = Process(tmp_path / "here", url)
    until(lambda: bool(copied(url)))
    second = Process(tmp_path / "there", url)
    do_work(second.files, 0)
    second.end()
    whole = copied(url)
    do_work(first.files, 5)
    with pytest.raises(UserError, match="taken over by another process"):
        first.end()
    first.files.__exit__()
    assert copied(url) == whole
