"""Which steps go on beside which, of which versions, and where iterations end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.core.config import EmConfig
from pipeline.core.run import RunFiles, write_json
from pipeline.iterations import iterate
from pipeline.run import Run
from pipeline.steps import Begun


class Log:
    """A run whose steps only say when they are done; version t has the dev score `scores[t]`."""

    def __init__(self, path: Path, scores: list[float]) -> None:
        self.files, self.scores, self.said = RunFiles(path), scores, list[str]()
        self.in_flight = set[str]()

    def _begin(self, what: str, then: Callable[[], None] = lambda: None) -> Begun:
        self.said.append(what)
        self.in_flight.add(what)

        def finish() -> dict[str, Any]:
            self.in_flight.remove(what)
            self.said.append(f"{what}: done")
            then()
            return {}

        def cancel() -> None:
            self.in_flight.remove(what)
            self.said.append(f"{what}: cancelled")

        return Begun(finish, cancel)

    def sample(self, t: int, version: int) -> Begun:
        return self._begin(f"sample {t} of {version}")

    def evaluate(self, t: int) -> Begun:
        scores = {"scores": {"em": self.scores[t]}}
        return self._begin(f"dev {t}", lambda: write_json(self.files.at(f"{t}/evaluation.json"), scores))

    def train(self, t: int) -> None:
        self.said.append(f"train {t}")

    def end_iteration(self, t: int, settings: EmConfig) -> None:
        self.said.append(f"end {t}")

    def iterate(self, **settings: Any) -> list[str]:
        run = cast(Run, self)
        iterate(run, EmConfig(**settings), self.evaluate, self.sample, self.train, report=lambda: None)
        assert not self.in_flight
        said, self.said = self.said, []
        return said


def test_dev_questions_are_answered_beside_the_next_sampling_of_the_same_version(tmp_path: Path) -> None:
    run = Log(tmp_path, [1.0, 2.0, 3.0])
    assert run.iterate(iterations=2) == [
        *("dev 0", "sample 1 of 0", "dev 0: done", "sample 1 of 0: done", "train 1"),
        *("dev 1", "sample 2 of 1", "dev 1: done", "end 1", "sample 2 of 1: done", "train 2"),
        *("dev 2", "dev 2: done", "end 2"),
    ]


def test_asynchronous_samplings_go_on_beside_the_training_of_the_version_behind_theirs(
    tmp_path: Path,
) -> None:
    run = Log(tmp_path, [1.0, 2.0, 3.0, 4.0])
    assert run.iterate(iterations=3, asynchronous=True) == [
        *("sample 1 of 0", "sample 1 of 0: done"),
        *("dev 0", "sample 2 of 0", "train 1", "dev 0: done", "sample 2 of 0: done"),
        *("dev 1", "sample 3 of 1", "train 2", "dev 1: done", "end 1", "sample 3 of 1: done"),
        *("dev 2", "train 3", "dev 2: done", "end 2"),
        *("dev 3", "dev 3: done", "end 3"),
    ]


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"iterations": 2}, "sample 2 of 1: cancelled"),
        ({"iterations": 4}, "sample 2 of 1: cancelled"),
        ({"iterations": 2, "asynchronous": True}, "end 1"),
        ({"iterations": 4, "asynchronous": True}, "sample 3 of 1: cancelled"),
    ],
)
def test_iterations_end_with_patience_and_a_later_start_begins_none_again(
    tmp_path: Path, settings: dict[str, Any], last: str
) -> None:
    """Behind version 1, which is no better than what it started from; the sampling that was begun is given up."""
    run = Log(tmp_path, [1.0, 1.0])
    said = run.iterate(**settings, patience=1)
    assert ("train 2" in said) == ("asynchronous" in settings)
    assert said[-1] == last
    again = run.iterate(**settings, patience=1)
    assert not {"dev 1", "train 2", last.removesuffix(": cancelled")} & set(again)


def test_without_iterations_nothing_is_sampled(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        run = Log(tmp_path, [1.0])
        assert run.iterate(iterations=0, asynchronous=asynchronous) == ["dev 0", "dev 0: done"]
