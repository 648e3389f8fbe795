"""`exsearch status` of runs that work, that ended and that were killed, from their files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.commands.status import in_words
from pipeline.core import progress
from pipeline.core.config.loading import load_config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.run import Json, RunDirectory, is_worked_on
from pipeline.core.status import run_status
from tests.pipeline.core.test_display import root_logger  # noqa: F401

SAMPLED = {
    "generated_tokens": 1000,
    "excluded": 3,
    "stop_reasons": {"answered": 5, "retriever_unavailable": 2, "engine_error": 1},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(progress, "PERIOD_S", 0.0)
    return RunDirectory(tmp_path / "run", load_config(None, ["em.iterations=3", "data.root=/"]))


@pytest.fixture
def display(root_logger: object) -> Display:  # noqa: F811
    return Display(Console(file=StringIO()))


def status(run: RunDirectory) -> Json:
    return run_status(run.path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml"):
        run_status(tmp_path)


def test_a_run_that_has_not_begun(run: RunDirectory) -> None:
    run.__exit__()
    found = status(run)
    assert (found["state"], found["phase"], found["starts"]) == ("not started", None, 0)
    assert found["iterations"] == {"finished": 0, "of": 3}
    assert found["seconds_left"] is None


def test_of_a_run_without_its_progress_nothing_is_claimed(run: RunDirectory) -> None:
    run.once("0/evaluation", dict)
    run.__exit__()
    assert status(run)["state"] == "unknown"


def test_a_run_at_work_tells_its_phase_and_the_innermost_one(run: RunDirectory, display: Display) -> None:
    with display.follow(run.path), display.progress("iteration 1: sampling", 8, "questions") as advance:
        advance(2)
        found = status(run)
        assert (found["state"], found["process"]["pid"], found["starts"]) == ("running", os.getpid(), 1)
        phase = found["phase"]
        assert [phase[key] for key in ("name", "unit", "done", "total")] == [
            "iteration 1: sampling",
            "questions",
            2,
            8,
        ]
        with display.status("starting the learner"):
            assert status(run)["phase"]["name"] == "starting the learner"
        assert status(run)["phase"]["done"] == 2
        advance.to(5, 10)
        assert [status(run)["phase"][key] for key in ("done", "total")] == [5, 10]


def test_the_first_questions_of_a_phase_say_nothing_of_the_time_left(
    run: RunDirectory, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    with display.follow(run.path), display.progress("sampling", 300, "questions") as advance:
        advance(2)
        assert status(run)["phase"]["seconds_left"] is None
        advance(28)
        phase = status(run)["phase"]
        assert phase["seconds_left"] == pytest.approx(9 * phase["seconds"])
        monkeypatch.setattr("pipeline.core.status.TELLING_SECONDS", 0.0)
        advance.to(2, 300)
        assert status(run)["phase"]["seconds_left"] > 0


def test_what_was_done_before_a_resumed_phase_is_shown_and_not_taken_for_its_speed(
    run: RunDirectory, display: Display
) -> None:
    with display.follow(run.path), display.progress("sampling", 9000, "questions", done=8000) as advance:
        phase = status(run)["phase"]
        assert (phase["done"], phase["begun_at"], phase["rate_per_s"]) == (8000, 8000, None)
        advance.to(8001, 9000)
        phase = status(run)["phase"]
        assert (phase["done"], phase["total"]) == (8001, 9000)
        assert phase["rate_per_s"] is None or phase["rate_per_s"] == pytest.approx(1 / phase["seconds"])
    # Where a learner begins is known when it has read its checkpoint.
    with display.follow(run.path), display.progress("training", None, "steps") as advance:
        advance.to(302, 900, 300)
        phase = status(run)["phase"]
        assert [phase[key] for key in ("done", "total", "begun_at")] == [302, 900, 300]
        assert phase["rate_per_s"] is None or phase["rate_per_s"] == pytest.approx(2 / phase["seconds"])


def test_how_a_run_ended_is_told(run: RunDirectory, display: Display) -> None:
    def end(how: BaseException | None) -> Json:
        try:
            with display.follow(run.path), display.progress("training", 8, "steps"):
                if how is not None:
                    raise how
        except (KeyboardInterrupt, RuntimeError):
            pass
        return status(run)

    assert end(KeyboardInterrupt())["state"] == "starting"  # the lock is still held
    run.__exit__()
    assert end(None)["state"] == "finished"
    assert end(KeyboardInterrupt())["state"] == "interrupted"
    failed = end(RuntimeError("no engine"))
    assert (failed["state"], failed["reason"]) == ("failed", "RuntimeError: no engine")
    assert (failed["phase"]["name"], failed["starts"]) == ("training", 4)
    assert "RuntimeError: no engine" in (run.path / "run.log").read_text()


def test_a_run_that_was_killed_is_known_by_its_lock(run: RunDirectory, display: Display) -> None:
    with display.follow(run.path), display.progress("training", 8, "steps") as advance:
        advance(3)
        left_behind = (run.path / progress.PROGRESS_FILE).read_bytes()
    (run.path / progress.PROGRESS_FILE).write_bytes(left_behind)
    run.__exit__()
    found = status(run)
    assert (found["state"], found["phase"]["done"], found["phase"]["seconds_left"]) == ("killed", 3, None)


def test_a_look_at_the_lock_does_not_keep_a_run_from_starting(run: RunDirectory) -> None:
    assert is_worked_on(run.path) is True
    run.__exit__()
    assert is_worked_on(run.path) is False
    RunDirectory(run.path, load_config(None, ["em.iterations=3", "data.root=/"])).__exit__()


def finish(run: RunDirectory, step: str, seconds: float, **figures: object) -> None:
    path = run.at(f"{step}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, "seconds": seconds}))


def test_steps_rates_failures_and_time_left_come_from_the_steps(run: RunDirectory) -> None:
    finish(run, "1/sample", 10.0, **SAMPLED)
    finish(run, "1/searcher/train", 20.0, trained_tokens_per_s=50.0)
    run.close_iteration(1)
    finish(run, "2/sample", 20.0, **SAMPLED)
    run.__exit__()
    found = status(run)
    assert found["steps"] == {"1/sample": 10.0, "1/searcher/train": 20.0, "2/sample": 20.0}
    assert found["rates"] == {"generated_tokens_per_s": 50.0, "trained_tokens_per_s": 50.0}
    lost = {"retriever_unavailable": 4, "retriever_bad_answer": 0, "action_unavailable": 0, "engine_error": 2}
    assert found["failures"] == {**lost, "excluded": 6}
    # The second iteration has done 20 of 30 seconds, and the third is still to come.
    assert (found["iterations"], found["seconds_left"]) == ({"finished": 1, "of": 3}, 40.0)


def test_dev_scores_are_told_as_they_come_with_the_best(run: RunDirectory) -> None:
    for t, (em, f1) in enumerate([(20.0, 31.0), (40.0, 50.0), (40.0, 55.0)]):
        scores = {"n": 10, "em": em, "em_interval": [em - 5, em + 5], "f1": f1, "accuracy": em}
        finish(run, f"{t}/evaluation", 1.0, scores=scores)
    finish(run, "3/sample", 10.0, **SAMPLED)
    run.__exit__()

    found = status(run)
    assert [(row["iteration"], row["em"], row["is_best"]) for row in found["dev"]] == [
        (0, 20, False), (1, 40, True), (2, 40, False)
    ]  # fmt: skip
    lines = list(in_words(found))
    assert "  0: EM 20.0 (15.0-25.0), F1 31.0" in lines
    assert "  1: EM 40.0 (35.0-45.0), F1 50.0, the best" in lines


def test_what_the_complete_shards_of_a_sampling_have_lost_is_counted_before_it_is_finished(
    run: RunDirectory,
) -> None:
    finish(run, "1/sample", 10.0, **SAMPLED)
    done = {"infrastructure_failures": 1, "statistics": {"stop_reasons": {"engine_error": 1, "answered": 3}}}
    other = {"infrastructure_failures": 0, "statistics": {"too_long_to_score": 2}}
    for t, tasks in ((1, [done]), (2, [done, other])):
        finish(run, f"{t}/rollouts/_000000", 0.0, tasks=tasks)
    lost = {"retriever_unavailable": 2, "retriever_bad_answer": 0, "action_unavailable": 0, "engine_error": 2}
    assert status(run)["failures"] == {**lost, "excluded": 6}


def test_restarts_are_those_of_all_processes(run: RunDirectory, display: Display) -> None:
    nothing = {"rollout": 0, "retriever": 0, "weighting": 0, "learner": 0}
    assert status(run)["restarts"] == nothing
    for _ in range(2):
        with display.follow(run.path):
            display.restarted("rollout")
            display.restarted("learner")
    assert status(run)["restarts"] == {**nothing, "rollout": 2, "learner": 2}
    assert "actors restarted: rollout 2, retriever 0, weighting 0, learner 2" in in_words(status(run))


def test_warnings_are_counted_and_the_last_are_shown(run: RunDirectory) -> None:
    lines = [f"2026-03-01 12:00:0{n},000 WARNING actors.pool: worker {n} died" for n in range(7)]
    (run.path / "run.log").write_text(
        "\n".join([lines[0], "Traceback: WARNING of a library", *lines[1:]]) + "\n"
    )
    found = status(run)
    assert (found["warnings"], found["last_warnings"]) == (7, lines[2:])


@pytest.fixture
def words(run: RunDirectory, display: Display) -> Iterator[str]:
    finish(run, "1/sample", 100.0, **SAMPLED)
    run.close_iteration(1)
    with display.follow(run.path), display.progress("iteration 2: sampling", 8, "questions") as advance:
        advance(2)
        yield "\n".join(in_words(status(run)))


def test_a_person_reads_it_in_lines(run: RunDirectory, words: str) -> None:
    lines = words.splitlines()
    assert lines[0].startswith(f"{run.path}: running (process {os.getpid()} on ")
    assert "phase: iteration 2: sampling, for 0:00:0" in words and "2 of 8 questions" in words
    assert "iterations finished: 1 of 3, about 0:0" in words
    assert "  1/sample: 0:01:40" in lines
    assert "generated tokens: 10/s" in lines
    lost = "retriever_unavailable 2, retriever_bad_answer 0, action_unavailable 0, engine_error 1, excluded 3"
    assert f"trajectories lost: {lost}" in lines
    assert lines[-1] == "warnings: 0"
