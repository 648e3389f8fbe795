"""The shards of a phase on disk: killed between any two writes, of other tasks, with files that are gone."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.agents.program import Completion, Task
from pipeline.core.agents.transcript import Transcript
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.shards import Counts, Done, Shards, generated_tokens
from pipeline.core.weighing import Weighted

TASKS = [Question(f"q{number}", f"Who is {number}?", (str(number),)) for number in range(5)]
OUTPUTS = ("first", "second")
FILES_PER_SHARD = 4


class Killed(BaseException):
    """Stands in for the end of the process: nothing in the program catches it."""


def episode(task: Question, reason: StopReason = StopReason.ANSWERED) -> Episode:
    transcript = Transcript()
    transcript.append_environment([1, 2, len(task.id)])
    detail = f"{task.id} is down" if reason.is_infrastructure else ""
    turn = transcript.trajectory(
        question_id=task.id, sample=0, role="a", policy_version=0, stop_reason=reason, detail=detail
    )
    return Episode(task.id, 0, (turn,))


def opened(at: Path, tasks: Sequence[Question] = TASKS, per_shard: int = 2, share: float = 1.0) -> Shards:
    shards = Shards(tasks, at / "rollouts", {name: at / name for name in OUTPUTS}, per_shard)
    shards.resume(share)
    return shards


def make(shards: Shards, numbers: Sequence[int], *failing: str) -> None:
    for number in numbers:
        shards.write(number, [done(task, *failing) for task in shards.members(number)])


def done(task: Task, *failing: str) -> Done:
    assert isinstance(task, Question)
    made = episode(task, StopReason.ENGINE_ERROR if task.id in failing else StopReason.ANSWERED)
    examples = [Example.of(made.turns[0], weight=1.0)]
    return [made], Weighted(dict.fromkeys(OUTPUTS, examples), {"text": task.text})


def make_loose(shards: Shards, *indices: int, failing: str = "") -> None:
    shards.write_loose({TASKS[index].id: done(TASKS[index], failing) for index in indices})


def files(at: Path) -> dict[str, tuple[bytes, int]]:
    """What is there: contents and inode."""
    paths = [path for path in at.rglob("*") if path.is_file()]
    return {str(path.relative_to(at)): (path.read_bytes(), path.stat().st_ino) for path in paths}


def contents(at: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files(at).items()}


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> Iterator[None]:
    """The block ends at that write: before the file has its name, or after."""
    written: list[Path] = []

    def rename(source: str, target: Path) -> None:
        dies = len(written) == number
        if not dies or after:
            real(source, target)
        if dies:
            raise Killed
        written.append(target)

    real = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", rename)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("after", [False, True], ids=["before the name is there", "after"])
@pytest.mark.parametrize("number", range(3 * FILES_PER_SHARD))
def test_a_kill_at_any_write_costs_the_shard_in_hand_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    make(opened(undisturbed), range(3))
    with killed_at(monkeypatch, number, after):
        make(opened(killed), range(3))
    (killed / "rollouts" / ".000002.parquet.1.tmp").write_bytes(b"half")
    before = files(killed)

    resumed = opened(killed)
    written = number + after
    assert sorted(resumed.complete) == list(range(written // FILES_PER_SHARD))
    assert len(files(killed)) == FILES_PER_SHARD * len(resumed.complete)
    missing = [shard for shard in range(3) if shard not in resumed.complete]
    assert resumed.to_do() == [task for shard in missing for task in resumed.members(shard)]
    make(resumed, missing)
    assert contents(killed) == contents(undisturbed)
    kept = {name: file for name, file in files(killed).items() if name in before and not is_of(name, missing)}
    assert kept == {name: before[name] for name in kept} and len(kept) == FILES_PER_SHARD * (3 - len(missing))


def is_of(name: str, shards: Sequence[int]) -> bool:
    return any(f"{shard:06d}" in name for shard in shards)


def test_the_last_shard_may_be_smaller_and_is_one_like_any_other(tmp_path: Path) -> None:
    make(opened(tmp_path), [2])
    resumed = opened(tmp_path)
    assert sorted(resumed.complete) == [2]
    assert [task.id for task in resumed.to_do()] == ["q0", "q1", "q2", "q3"]


def test_a_whole_phase_has_nothing_to_do_and_all_its_figures(tmp_path: Path) -> None:
    make(opened(tmp_path), range(3), "q1")
    resumed = opened(tmp_path)
    assert resumed.to_do() == []
    assert resumed.counts() == Counts(5, 0, 1, "q1 is down")
    assert [row["text"] for row in resumed.statistics()] == [task.text for task in TASKS]


@pytest.mark.parametrize("name", ["rollouts/000001.parquet", "first/000001.parquet", "second/000001.parquet"])
def test_a_shard_without_one_of_its_files_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    make(opened(tmp_path), range(3))
    whole = contents(tmp_path)
    (tmp_path / name).unlink()
    resumed = opened(tmp_path)
    assert sorted(resumed.complete) == [0, 2]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{tmp_path / name} is missing") and line.endswith("this shard is made again")
    assert not any(is_of(name, [1]) for name in contents(tmp_path))
    make(resumed, [1])
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("name", ["rollouts/000001.parquet", "second/000001.parquet"])
@pytest.mark.parametrize("damaged", [lambda content: content[:-1], lambda content: b"x" + content[1:]])
def test_a_shard_with_a_file_that_was_cut_or_changed_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    make(opened(tmp_path), range(3))
    whole = contents(tmp_path)
    (tmp_path / name).write_bytes(damaged(whole[name]))
    resumed = opened(tmp_path)
    assert sorted(resumed.complete) == [0, 2]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(str(tmp_path / name)) and line.endswith("this shard is made again")
    make(resumed, [1])
    assert contents(tmp_path) == whole


OTHER_ANSWER = [*TASKS[:3], replace(TASKS[3], answers=("another",)), TASKS[4]]


@pytest.mark.parametrize(
    ("tasks", "kept"),
    [
        pytest.param(OTHER_ANSWER, [0, 2], id="another answer"),
        pytest.param([TASKS[1], TASKS[0], *TASKS[2:]], [1, 2], id="another order"),
        pytest.param(TASKS[:4], [0, 1], id="fewer"),
        pytest.param([*TASKS, Question("q5", "Who?", ("5",))], [0, 1], id="more"),
    ],
)
def test_shards_of_other_tasks_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tasks: list[Question], kept: list[int]
) -> None:
    make(opened(tmp_path), range(3))
    assert sorted(opened(tmp_path, tasks).complete) == kept
    assert len(contents(tmp_path)) == FILES_PER_SHARD * len(kept)
    if len(tasks) >= len(TASKS):  # of what is left over there is nothing to be made again
        assert "is of other tasks; this shard is made again" in caplog.text


@pytest.mark.parametrize(
    "text", ['{"tasks": [{"stop_reasons": {}}, {"stop_reasons": {}}]}', "{", "[]", '{"tasks": [1, 2]}']
)
def test_a_side_car_of_an_earlier_version_or_no_side_car_at_all_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    make(opened(tmp_path), range(3))
    side_car = tmp_path / "rollouts" / "_000000.json"
    side_car.write_text(text)
    assert sorted(opened(tmp_path).complete) == [1, 2]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(side_car) in line and "of an earlier version" in line


# ---------------------------------------------------------------- tasks whose shards are not complete


def test_tasks_that_are_written_before_their_shard_is_complete_are_not_to_do_and_can_be_read(
    tmp_path: Path,
) -> None:
    make(shards := opened(tmp_path), [1])
    make_loose(shards, 4, 0)
    resumed = opened(tmp_path)
    assert [task.id for task in resumed.to_do()] == ["q1"]
    assert resumed.counts().episodes == 4
    found = resumed.read_loose()
    assert found.keys() == {"q0", "q4"}
    whole = contents(tmp_path)
    resumed.write_loose(found)
    again = opened(tmp_path).read_loose()
    assert [weighted.statistics["text"] for _, weighted in again.values()] == ["Who is 4?", "Who is 0?"]
    written = {name: content for name, content in contents(tmp_path).items() if "_loose/000001" in name}
    assert {name.replace("000001", "000000"): content for name, content in written.items()} == {
        name: content for name, content in whole.items() if "_loose" in name
    }


def test_what_is_kept_of_a_task_goes_when_its_shard_is_complete(tmp_path: Path) -> None:
    make(opened(tmp_path / "undisturbed"), range(3))
    make_loose(opened(tmp_path / "killed"), 0, 2)
    make_loose(opened(tmp_path / "killed"), 4)
    resumed = opened(tmp_path / "killed")
    make(resumed, [0, 1])
    resumed.remove_loose({"q4"})
    loose = tmp_path / "killed" / "rollouts" / "_loose"
    assert [path.name for path in loose.iterdir()] == ["000001"]
    make(resumed, [2])
    assert opened(tmp_path / "killed").to_do() == []
    assert not loose.exists()
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("after", [False, True], ids=["before the name is there", "after"])
@pytest.mark.parametrize("number", range(FILES_PER_SHARD))
def test_a_kill_while_tasks_are_written_leaves_all_of_them_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    with killed_at(monkeypatch, number, after):
        make_loose(opened(tmp_path), 0, 3)
    is_whole = number == FILES_PER_SHARD - 1 and after
    resumed = opened(tmp_path)
    assert set(resumed.loose) == ({"q0", "q3"} if is_whole else set())
    assert len(contents(tmp_path)) == (FILES_PER_SHARD if is_whole else 0)


def test_tasks_that_have_changed_or_files_that_are_damaged_are_not_kept(tmp_path: Path) -> None:
    make_loose(opened(tmp_path), 0, 3)
    make_loose(opened(tmp_path), 1)
    assert set(opened(tmp_path, OTHER_ANSWER).loose) == {"q1"}
    (tmp_path / "rollouts" / "_loose" / "000001" / "second.parquet").write_bytes(b"x")
    assert opened(tmp_path).loose == {}
    assert contents(tmp_path) == {}


def test_tasks_whose_failures_ended_a_phase_have_another_chance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_loose(opened(tmp_path), 0, 3, failing="q3")
    make_loose(opened(tmp_path), 1)
    assert set(opened(tmp_path, share=0.5).loose) == {"q0", "q1", "q3"}
    assert set(opened(tmp_path, share=0.3).loose) == {"q1"}
    assert "0 shards and 2 tasks of others are made again; last: q3 is down" in caplog.text
    assert set(opened(tmp_path).loose) == {"q1"}


def test_failures_that_are_to_be_made_good_do_not_come_back(tmp_path: Path) -> None:
    """The weighting actor reads what is written once more when it has died, whatever the share."""
    make_loose(opened(tmp_path), 0, 4, failing="q0")
    shards = opened(tmp_path)
    make(shards, [0], "q0")
    assert (set(opened(tmp_path).complete), set(opened(tmp_path).loose)) == ({0}, {"q4"})
    assert opened(tmp_path, share=0.1).to_do() == TASKS
    assert opened(tmp_path).to_do() == TASKS


def test_what_belongs_to_no_shard_is_removed(tmp_path: Path) -> None:
    make(opened(tmp_path), range(3))
    whole = files(tmp_path)
    (tmp_path / "first" / "000009.parquet").write_bytes(b"of a longer phase")
    (tmp_path / "rollouts" / "_000009.json").write_text("{}")
    (tmp_path / "rollouts" / "folder").mkdir()
    opened(tmp_path)
    assert files(tmp_path) == whole
    assert not (tmp_path / "rollouts" / "folder").exists()


def test_failures_that_ended_a_phase_have_another_chance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(opened(tmp_path), range(3), "q1", "q4")
    assert sorted(opened(tmp_path, share=0.4).complete) == [0, 1, 2]
    assert sorted(opened(tmp_path, share=0.3).complete) == [1]
    assert "2 shards and 0 tasks of others are made again; last: q4 is down" in caplog.text


def test_the_log_says_what_is_not_sampled_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make(opened(tmp_path), [0, 2])
    assert "complete" not in caplog.text
    opened(tmp_path)
    assert "2 of 3 shards are complete, 3 of 5 tasks are not sampled again" in caplog.text


def test_shards_travel_to_the_weighting_actor(tmp_path: Path) -> None:
    there: Shards = pickle.loads(pickle.dumps(opened(tmp_path)))
    make(there, [0])
    assert there.shard_of(TASKS[4]) == 2
    assert sorted(opened(tmp_path).complete) == [0]


def test_a_side_car_says_of_each_task_what_was_counted(tmp_path: Path) -> None:
    make(opened(tmp_path), [0], "q1")
    rows = json.loads((tmp_path / "rollouts" / "_000000.json").read_text())["tasks"]
    assert [row["id"] for row in rows] == ["q0", "q1"]
    assert rows[0]["digest"] != rows[1]["digest"]
    assert [row["infrastructure_failures"] for row in rows] == [0, 1]
    assert [row["last_failure"] for row in rows] == ["", "q1 is down"]


def test_how_much_was_generated_for_a_task_can_be_read_again_of_all_shards_that_are_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generated_tokens(tmp_path / "rollouts") == {}
    shards = opened(tmp_path)
    for number in range(len(shards)):
        members = shards.members(number)
        shards.write(number, [([writes(int(task.id[1:]), task)], Weighted(EXAMPLES, {})) for task in members])
    assert generated_tokens(tmp_path / "rollouts") == {f"q{number}": number for number in range(5)}
    (tmp_path / "rollouts/_000001.json").write_text("{")
    assert generated_tokens(tmp_path / "rollouts") == {"q0": 0, "q1": 1, "q4": 4}
    assert "it says nothing of how long questions take" in caplog.text


EXAMPLES: dict[str, list[Example]] = {name: [] for name in OUTPUTS}


def writes(tokens: int, task: Task) -> Episode:
    """An episode in which the model writes so many tokens."""
    transcript = Transcript()
    transcript.append_environment([1, 2])
    transcript.append_model(Completion([5] * tokens, [-1.0] * tokens, "", None, "eos"))
    turn = transcript.trajectory(
        question_id=task.id, sample=0, role="a", policy_version=0, stop_reason=StopReason.ANSWERED
    )
    return Episode(task.id, 0, (turn,))
