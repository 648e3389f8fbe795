"""When the engines of a run start: with the first step that is left, and not without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipeline.test_run import opened


def test_engines_start_with_the_first_step_that_is_left_and_end_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as run:
        run.once("test/base", lambda: {"em": 1.0})
    events = list[str]()

    @contextmanager
    def cluster(*_: object, **__: object) -> Iterator[None]:
        events.append("up")
        yield
        events.append("down")

    monkeypatch.setattr("pipeline.run.Cluster", cluster)
    with opened(tmp_path) as run, run:
        del run.cluster
        assert run.once("test/base", dict)["em"] == 1.0
        assert events == []
        run.once("test/best", lambda: {"steps": len(events)})
        assert run.once("test/best", dict)["steps"] == 1
    assert events == ["up", "down"]


def test_a_cluster_that_does_not_start_leaves_the_step_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoGpuError(Exception):
        pass

    def cluster(*_: object, **__: object) -> None:
        raise NoGpuError

    monkeypatch.setattr("pipeline.run.Cluster", cluster)
    done = list[str]()
    with opened(tmp_path) as run, run:
        del run.cluster
        with pytest.raises(NoGpuError):
            run.once("test/base", lambda: {"done": done.append("base")})
    assert done == [] and run.files.finished("test/base") is None
