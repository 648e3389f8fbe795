"""The weighting actor as a plain object: shards and their side-cars, whatever the order in which tasks finish."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import weighting as module
from actors.weighting import Weighting
from pipeline.core.agents.transcript import Transcript
from pipeline.core.record_tables import examples_from_table, trajectories_from_table
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.shards import Shards
from pipeline.core.weighing import Weighted


class Halves:
    """Gives two outputs an example each per episode, with the sample's number as weight."""

    outputs = ("first", "second")

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        if any(episode.failure for episode in episodes):
            raise ConnectionError("a failure in the middle")
        examples = [Example.of(e.turns[0], weight=float(e.sample)) for e in episodes]
        return Weighted({"first": examples, "second": examples}, {"id": task.id, "n": len(episodes)})

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {"ids": [row["id"] for row in statistics], "n": sum(row["n"] for row in statistics)}


def questions(number: int) -> list[Question]:
    return [Question(f"q{i}", f"Question {i}?", ("answer",)) for i in range(number)]


def episodes(task: Question, reason: StopReason = StopReason.ANSWERED) -> list[Episode]:
    def episode(sample: int) -> Episode:
        transcript = Transcript()
        transcript.append_environment([1, 2, sample])
        turn = transcript.trajectory(
            question_id=task.id, sample=sample, role="a", policy_version=0, stop_reason=reason
        )
        return Episode(task.id, sample, (turn,))

    return [episode(sample) for sample in range(2)]


class Phase:
    """An actor in the middle of a phase."""

    def __init__(
        self,
        at: Path,
        tasks: Sequence[Question],
        actor: Weighting | None = None,
        weigh: Halves | None = None,
        per_shard: int = 2,
    ) -> None:
        self.at, self.actor = at, actor or Weighting()
        self.shards = Shards(tasks, at / "rollouts", {n: at / n for n in Halves.outputs}, per_shard)
        self.shards.resume()
        asyncio.run(self.actor.begin(self.shards, weigh or Halves()))

    def add(self, task: Question, **options: Any) -> bool:
        return asyncio.run(self.actor.add(episodes(task, **options)))

    def finish(self) -> dict[str, Any]:
        return asyncio.run(self.actor.finish())

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.at.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.at)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_shards_do_not_depend_on_the_order_in_which_tasks_finish(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    tasks = questions(5)
    expected, phase = Phase(tmp_path / "expected", tasks), Phase(tmp_path / "phase", tasks)
    for task in tasks:
        expected.add(task)
    for index in order:
        phase.add(tasks[index])
    assert phase.files() == expected.files()
    assert phase.finish() == expected.finish() == {"ids": [task.id for task in tasks], "n": 10}
    shards = [f"00000{n}.parquet" for n in range(3)]
    assert sorted(path.name for path in (phase.at / "first").iterdir()) == shards


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    (task,) = questions(1)
    phase = Phase(tmp_path, [task])
    phase.add(task)
    # A reader of the whole folder meets the side-cars too.
    assert [t.sample for t in trajectories_from_table(pq.read_table(tmp_path / "rollouts"))] == [0, 1]
    examples = examples_from_table(pq.read_table(tmp_path / "second"))
    assert [example.number("weight") for example in examples] == [0.0, 1.0]
    side_car = json.loads((tmp_path / "rollouts" / "_000000.json").read_text())
    assert side_car.pop("files").keys() == {"rollouts", "first/examples", "second/examples"}
    assert side_car["tasks"][0].pop("digest")
    counts = {"episodes": 2, "generated_tokens": 0, "infrastructure_failures": 0, "last_failure": ""}
    row = {"id": "q0", **counts, "turns": 2, "examples": {"first": 2, "second": 2}}
    assert side_car == {"tasks": [{**row, "statistics": {"id": "q0", "n": 2}}]}


def test_failed_episodes_are_kept_to_read(tmp_path: Path) -> None:
    class Nothing(Halves):
        def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
            return Weighted({"first": [], "second": []}, {"id": task.id, "n": 0})

    (task,) = questions(1)
    phase = Phase(tmp_path, [task], weigh=Nothing())
    phase.add(task, reason=StopReason.ENGINE_ERROR)
    kept = trajectories_from_table(pq.read_table(tmp_path / "rollouts" / "000000.parquet"))
    assert [turn.stop_reason for turn in kept] == [StopReason.ENGINE_ERROR] * 2
    assert examples_from_table(pq.read_table(tmp_path / "first" / "000000.parquet")) == []


def test_a_shard_is_written_as_soon_as_its_last_task_is_in(tmp_path: Path) -> None:
    tasks = questions(4)
    phase, seen = Phase(tmp_path, tasks), []
    for index in (3, 0, 1, 2):
        is_complete = phase.add(tasks[index])
        seen.append((is_complete, sorted(path.name for path in (tmp_path / "first").iterdir())))
    one, two = ["000000.parquet"], ["000000.parquet", "000001.parquet"]
    assert seen == [(False, []), (False, []), (True, one), (True, two)]


@settings(max_examples=25)
@given(st.permutations(range(9)), st.sets(st.integers(0, 8)), st.integers(1, 4))
def test_an_actor_that_dies_costs_fewer_tasks_than_a_shard_has_in_whatever_order_they_finish(
    tmp_path_factory: pytest.TempPathFactory, order: Sequence[int], deaths: set[int], per_shard: int
) -> None:
    at, tasks = tmp_path_factory.mktemp("phases"), questions(9)
    expected, phase = (Phase(at / name, tasks, per_shard=per_shard) for name in ("expected", "phase"))
    for task in tasks:
        expected.add(task)
    waiting, done = deque(tasks[index] for index in order), list[Question]()
    while waiting:
        phase.add(task := waiting.popleft())
        done.append(task)
        if len(done) in deaths:
            deaths.remove(len(done))
            phase = Phase(phase.at, tasks, per_shard=per_shard)
            lost = [task for task in done if task in phase.shards.to_do()]
            assert len(lost) < per_shard
            assert phase.shards.counts().episodes == 2 * (len(done) - len(lost))
            done = [task for task in done if task not in lost]
            waiting.extend(lost)
    assert phase.finish() == expected.finish()
    assert phase.files() == expected.files()


def test_what_is_done_does_not_wait_for_long_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = questions(8)
    phase = Phase(tmp_path, tasks, per_shard=8)
    phase.add(tasks[0])
    assert phase.files() == {}
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.0)
    phase.add(tasks[1])
    assert Phase(tmp_path, tasks, per_shard=8).shards.loose.keys() == {"q0", "q1"}


def test_tasks_of_complete_shards_are_taken_and_change_nothing(tmp_path: Path) -> None:
    tasks = questions(4)
    before = Phase(tmp_path, tasks)
    for task in tasks[:3]:
        before.add(task)
    written = before.files()
    resumed = Phase(tmp_path, tasks)
    assert set(resumed.shards.complete) == {0}
    assert resumed.add(tasks[0], reason=StopReason.ANSWERED)
    assert resumed.files() == written
    assert [resumed.add(task) for task in tasks[2:]] == [False, True]
    assert resumed.finish() == {"ids": [task.id for task in tasks], "n": 8}


def test_nothing_of_an_earlier_phase_is_left_in_the_next(tmp_path: Path) -> None:
    first, second = questions(2)
    earlier = Phase(tmp_path / "earlier", [first, second])
    earlier.add(first)
    later = Phase(tmp_path / "later", [second], earlier.actor)
    later.add(second)
    assert later.finish()["ids"] == ["q1"]
    assert earlier.files() == {}


def test_a_task_that_fails_on_its_way_leaves_nothing_behind_and_can_come_again(tmp_path: Path) -> None:
    tasks = questions(2)
    phase = Phase(tmp_path, tasks)
    phase.add(tasks[0])
    with pytest.raises(ConnectionError):
        phase.add(tasks[1], reason=StopReason.ENGINE_ERROR)
    assert phase.files() == {}
    with pytest.raises(RuntimeError, match="not complete: 2 of 2 tasks are missing"):
        phase.finish()
    phase.add(tasks[1])
    assert phase.finish()["n"] == 4


def test_directories_of_other_outputs_are_refused(tmp_path: Path) -> None:
    into = Shards(questions(1), tmp_path, {"first": tmp_path}, 2)
    with pytest.raises(ValueError, match=r"\['first'\] are not \['first', 'second'\]"):
        asyncio.run(Weighting().begin(into, Halves()))
