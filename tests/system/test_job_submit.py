"""`ray job submit` on two nodes: stopped in the middle it leaves nothing behind, and submitted again it goes on; as
`make chaos` shows, to the result of an undisturbed run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.core.record_tables import trajectories_from_table
from pipeline.core.status import run_status
from tests.system.conftest import overrides, random_model
from tests.system.ray_start import Nodes, await_, shared_memory, two_nodes
from tests.system.test_resume import history, scores, trained, trajectories, weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

SUBMIT = ("job", "submit", "--working-dir", ".", "--runtime-env", "deploy/runtime-env.yaml")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as started:
        yield started


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["short", "whole"]
)
def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    nodes: Nodes, world: Path, index: Path, tmp_path: Path, whole: bool
) -> None:
    settings = [
        *overrides(world, index, random_model(tmp_path / "model", "Qwen2")),
        *("rollout.workers=2", "rollout.samples=8", "rollout.concurrency=4", "rollout.questions_per_shard=1"),
        # An M-step that goes on for longer than `ray job stop` takes to begin.
        *("learner.batch_size=1", "learner.epochs=8", "learner.checkpoint_minutes=1e-9"),
        *("cold_start.questions=0", "evaluation.baselines=false"),
    ]
    stopped = tmp_path / "stopped"
    sample = stopped / "iterations/0001/sample.json"
    shards, checkpoint = (
        stopped / "iterations/0001/rollouts",
        "iterations/0001/searcher/learner/checkpoint.json",
    )
    if whole:
        stop_when(nodes, "e-step", stopped, settings, lambda: any(shards.glob("*.parquet")))
        assert not sample.exists()
    stop_when(nodes, f"m-step-{whole}", stopped, settings, (stopped / checkpoint).exists)
    assert sample.exists() and not (stopped / "iterations/0001/searcher/train.json").exists()
    follow(nodes, f"to-the-end-{whole}", stopped, settings)
    assert trained(stopped)["resumed_at"] > 0
    if whole:
        undisturbed = tmp_path / "undisturbed"
        assert "iteration 1: sampling" in follow(nodes, "undisturbed", undisturbed, settings)
        assert_same(stopped, undisturbed)


def assert_same(run: Path, undisturbed: Path) -> None:
    assert scores(run) == scores(undisturbed)
    assert history(run) == history(undisturbed)
    for ours, theirs in zip(trajectories(run), trajectories(undisturbed), strict=True):
        assert ours.question_id == theirs.question_id
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    for name, tensor in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(run)[name], tensor)
    for step in ("iterations/0001/evaluation", "test/best"):
        ours, theirs = (answers(at / f"{step}.parquet") for at in (run, undisturbed))
        assert ours == theirs


def entrypoint(run: Path, settings: list[str]) -> list[str]:
    return ["python", "-m", "pipeline.cli", "train", "--run", str(run), *settings]


def answers(path: Path) -> list[list[int]]:
    return [t.token_ids.tolist() for t in trajectories_from_table(pq.read_table(path))]


def follow(nodes: Nodes, job: str, run: Path, settings: list[str]) -> str:
    """What a job prints that is waited for."""
    said = nodes.ray(*SUBMIT, "--submission-id", job, "--", *entrypoint(run, settings))
    assert f"Job '{job}' succeeded" in said
    return said


def stop_when(nodes: Nodes, job: str, run: Path, settings: list[str], reached: Callable[[], bool]) -> None:
    """Submit, stop as soon as `reached` says so, and look at what the job said and what it left."""
    before, known = nodes.below(), {row["actor_id"] for row in nodes.listed("actors")}
    nodes.ray(*SUBMIT, "--submission-id", job, "--no-wait", "--", *entrypoint(run, settings))
    await_(reached, nodes)
    started = nodes.below() - before
    shared = shared_memory(started)
    said = nodes.ray("job", "stop", job)
    assert f"Job '{job}' was stopped" in said
    actors = [row for row in nodes.listed("actors") if row["actor_id"] not in known]
    assert len({row["node_id"] for row in actors if row["class_name"] == "RolloutWorker"}) == 2

    assert nodes.job_status(job) == "STOPPED"
    log = nodes.ray("job", "logs", job)
    assert "Traceback" not in log and "\n***" not in log
    assert (
        "error: interrupted by SIGTERM; what was finished is kept, go on with: "
        f"python -m pipeline.cli {shlex.join(['train', '--run', str(run), *settings])}"
    ) in log.splitlines()
    assert run_status(run)["state"] == "interrupted"

    _, alive = psutil.wait_procs(started, timeout=30)
    assert [" ".join(process.cmdline()) for process in alive] == []
    assert {path for path in shared if path.exists()} == set()
    deadline = time.monotonic() + 30
    while left := [
        (kind, row.get("class_name") or row.get("placement_group_id"))
        for kind, ended in (("actors", "DEAD"), ("placement-groups", "REMOVED"))
        for row in nodes.listed(kind)
        if row["state"] != ended
    ]:
        assert time.monotonic() < deadline, left
