"""Whatever is killed, at whatever moment: the run ends with the trajectories, weights and scores of an undisturbed one.

A run of four iterations loses one and the same part at six moments, or each moment another; `make test` has a run of
two, and three moments.
With `-rP` pytest shows, for each of them, how long it took until work went on and what was done again
(docs/reliability.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from pipeline.core.record_tables import trajectories_from_table
from pipeline.core.records import Trajectory
from tests.system.conftest import SEARCHER, overrides
from tests.system.machines import Machines, kill, tree
from tests.system.moments import CHECKPOINT, E_STEP, EVALUATION, M_STEP, PUSH, SCORING, VARIABLE, Moments

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]

FROM = {
    E_STEP: "iterations/0001/searcher/train.json",
    M_STEP: "iterations/0002/sample.json",
    EVALUATION: "iterations/0002/searcher/train.json",
    PUSH: "iterations/0003/sample.json",
    SCORING: "iterations/0003/searcher/train.json",
    CHECKPOINT: "iterations/0004/sample.json",
}
"""The moments, and what the run has when the next one of that kind is the one meant. An E-step and the evaluation of
the iteration before it go on beside each other.

While a learner works no engine is replaced, so that an engine is lost at one of its moments an iteration: then the
other one is there for the push.
"""
OUTAGE_S = 5.0
"""How long all retrievers die as soon as they are there."""
DEADLINE_S = 600.0


class Disturbed:
    """A run on several nodes that is struck while it works.

    Args:
        at: a folder of its own.
        settings: overrides of its configuration.
        iterations: how many it has.
    """

    def __init__(self, at: Path, settings: list[str], machines: Machines, iterations: int) -> None:
        self.run, self.machines = at / "run", machines
        at.mkdir()
        self.moments = Moments(at / "moments")
        self.moments.directory.mkdir()
        self._settings = [*settings, f"em.iterations={iterations}"]
        self._iterations, self._said = iterations, (at / "said.log").open("ab")
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        self.driver = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.system.with_moments", "train"),
                *("--run", str(self.run), *self._settings),
            ],
            env={
                **os.environ,
                "RAY_ADDRESS": self.machines.address,
                VARIABLE: str(self.moments.directory),
            },
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            assert self.driver.poll() is None or reached(), (
                f"ended with {self.driver.returncode} before {what}"
            )
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.02)

    def strike(self, moment: str, victim: str) -> str:
        """Kill the victim at that moment; what became of it, for a row of the matrix."""
        self.wait_for((self.run / FROM[moment]).exists, FROM[moment])
        self.moments.arm(moment)
        self.wait_for(lambda: self.moments.reached_by(moment) is not None, moment)
        if moment in (E_STEP, SCORING, EVALUATION):
            self.wait_for(self._is_at_full_strength, "the replacement of workers lost before")
        struck = time.time()
        VICTIMS[victim](self, self.moments.reached_by(moment))
        before = self.moments.work()
        self.moments.end(moment)
        if self.driver.poll() is not None:
            self._wait_until_its_actors_have_ended()
            before = self.moments.work()
            self.start()
        self.wait_for(lambda: self._is_done(moment), f"the end of {moment} after the loss of the {victim}")
        after = self.moments.work()[len(before) :]
        seconds = next((unit.at - struck for unit in after if unit.has_ended), 0.0)
        known = {unit.name for unit in before}
        again = Counter(unit.name.split()[0] for unit in after if not unit.has_ended and unit.name in known)
        repeated = ", ".join(f"{n} x {kind}" for kind, n in again.items()) or "nothing"
        return f"{victim:<24}{moment:<12}{seconds:>8.1f} s  {repeated}"

    def _wait_until_its_actors_have_ended(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while any(self.machines.processes(name) for name in ("RolloutWorker", "LearnerRank")):
            assert time.monotonic() < deadline, "actors outlive their driver"
            time.sleep(0.1)

    def _is_at_full_strength(self) -> bool:
        log, worker = (self.run / "run.log").read_text(encoding="utf-8"), r"rollout worker \d+ of searcher "
        return len(re.findall(worker + "(?:is lost|leaves)", log)) == len(re.findall(worker + "joins", log))

    def _is_done(self, moment: str) -> bool:
        """Whether the run has come to where the next moment may be."""
        behind = [*FROM.values(), f"iterations/000{self._iterations}/DONE"][list(FROM).index(moment) + 1]
        return self.driver.poll() == 0 or (self.run / behind).exists()

    def finish(self) -> None:
        assert self.driver.wait(DEADLINE_S) == 0

    def close(self) -> None:
        kill(tree(psutil.Process(self.driver.pid)) if self.driver.poll() is None else [])
        self._said.close()


# ---------------------------------------------------------------- who is killed


def the_one(name: str, disturbed: Disturbed, pid: int | None) -> psutil.Process:
    """The process of that kind that announced the moment, or else the oldest one."""
    processes = disturbed.machines.processes(name)
    return next((p for p in processes if p.pid == pid), processes[0])


def kill_one(name: str) -> Callable[[Disturbed, int | None], None]:
    return lambda disturbed, pid: the_one(name, disturbed, pid).kill()


def kill_engine(disturbed: Disturbed, pid: int | None) -> None:
    worker = the_one("RolloutWorker", disturbed, pid)
    next(p for p in worker.children() if "EngineCor" in p.name()).kill()


def lose_node(disturbed: Disturbed, pid: int | None) -> None:
    disturbed.machines.lose_node_of(the_one("RolloutWorker", disturbed, pid).pid)


def kill_retrievers(disturbed: Disturbed, pid: int | None) -> None:
    until = time.monotonic() + OUTAGE_S
    while time.monotonic() < until:
        kill(disturbed.machines.processes("RetrieverActor"))
        time.sleep(0.1)


def kill_driver(disturbed: Disturbed, pid: int | None) -> None:
    disturbed.driver.kill()
    disturbed.driver.wait(60)


def lose_head(disturbed: Disturbed, pid: int | None) -> None:
    """The driver is one of its processes, as that of a submitted job is."""
    disturbed.machines.lose_head()
    kill_driver(disturbed, pid)
    disturbed.machines.start_again()


VICTIMS: dict[str, Callable[[Disturbed, int | None], None]] = {
    "rollout worker": kill_one("RolloutWorker"),
    "its engine process": kill_engine,
    "its node": lose_node,
    "a retriever replica": kill_one("RetrieverActor"),
    "all retrievers for 5 s": kill_retrievers,
    "weighting actor": kill_one("Weighting"),
    "learner rank": kill_one("LearnerRank"),
    "driver": kill_driver,
    "head node": lose_head,
}


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines(nodes=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def settings(world: Path, index: Path) -> list[str]:
    return [
        *overrides(world, index, SEARCHER),
        "model.max_length=1536",
        "agent.documents=2",
        "agent.max_searches=4",
        "agent.max_document_tokens=128",
        # Answers are scored all the same. Their last digits, which depend on who is in the batch, train nobody then.
        "weighting=uniform",
        "cold_start.questions=0",
        "learner.learning_rate=2e-4",
        "learner.tokens_per_microbatch=1536",
        "evaluation.baselines=false",
        "rollout.workers=2",
        "rollout.questions_per_shard=2",
        "rollout.concurrency=4",
        "rollout.max_restarts=8",
        "retriever.replicas=2",
        "learner.batch_size=4",
        "learner.epochs=2",
        "learner.checkpoint_minutes=1e-9",
    ]


@pytest.fixture(scope="module")
def undisturbed(
    settings: list[str], machines: Machines, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Of as many iterations as are asked for."""

    @cache
    def run(iterations: int) -> Path:
        at = tmp_path_factory.mktemp("runs") / f"undisturbed-{iterations}"
        disturbed = Disturbed(at, settings, machines, iterations)
        try:
            disturbed.start()
            disturbed.finish()
        finally:
            disturbed.close()
        return disturbed.run

    return run


SHORT = {E_STEP: "rollout worker", M_STEP: "learner rank", EVALUATION: "a retriever replica"}
EACH_AT_ITS_MOMENT = {
    E_STEP: "weighting actor",
    M_STEP: "learner rank",
    EVALUATION: "its engine process",
    PUSH: "rollout worker",
    SCORING: "a retriever replica",
    CHECKPOINT: "driver",
}
WHOLE = [
    pytest.param(strikes, 4, id=name, marks=pytest.mark.chaos)
    for name, strikes in (
        ("each at its moment", EACH_AT_ITS_MOMENT),
        *((victim, dict.fromkeys(FROM, victim)) for victim in VICTIMS),
    )
]


@pytest.mark.parametrize(("strikes", "iterations"), [pytest.param(SHORT, 2, id="short"), *WHOLE])
def test_whatever_is_killed_at_whatever_moment_the_result_is_that_of_an_undisturbed_run(
    strikes: dict[str, str],
    iterations: int,
    undisturbed: Callable[[int], Path],
    settings: list[str],
    machines: Machines,
    tmp_path: Path,
) -> None:
    disturbed = Disturbed(tmp_path / "disturbed", settings, machines, iterations)
    try:
        disturbed.start()
        for moment, victim in strikes.items():
            print(disturbed.strike(moment, victim), flush=True)
        disturbed.finish()
    finally:
        disturbed.close()
    again = sum(victim in ("driver", "head node") for victim in strikes.values())
    assert disturbed.starts == 1 + again
    assert_same(disturbed.run, undisturbed(iterations), iterations)


def assert_same(run: Path, undisturbed: Path, iterations: int) -> None:
    """Trajectories to the token, weights to the bit, scores to the last digit."""
    for t in range(1, iterations + 1):
        iteration = f"iterations/000{t}"
        ours, theirs = (trajectories(r / iteration / "rollouts") for r in (run, undisturbed))
        assert ours.keys() == theirs.keys()
        for key, trajectory in ours.items():
            np.testing.assert_array_equal(trajectory.token_ids, theirs[key].token_ids)
        mine, others = (
            load_file(r / iteration / "searcher/model/model.safetensors") for r in (run, undisturbed)
        )
        for name, tensor in others.items():
            np.testing.assert_array_equal(mine[name], tensor)
    assert scores(run) == scores(undisturbed)


def trajectories(rollouts: Path) -> dict[tuple[str, int], Trajectory]:
    """By question and sample; each is there once."""
    rows = trajectories_from_table(pq.read_table(rollouts))
    found = {(row.question_id, row.sample): row for row in rows}
    assert len(found) == len(rows)
    return found


def scores(run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text())
    return {name: (result["em"], result["f1"]) for name, result in report["test"].items()} | {
        str(row["iteration"]): row["dev"]["f1"] for row in report["iterations"]
    }
