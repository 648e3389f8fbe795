"""A weighting actor that dies or hangs: it is replaced, complete shards count, and each task is counted once."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import RayActorError

from actors import weighting as module
from actors.engine_options import EngineOptions
from actors.hands import Hands
from actors.observer import Observer
from actors.rollout import Receipt, RolloutRequest
from actors.sampling import Phase, Work, run_phase
from actors.session import ClusterError
from actors.weighting import ShardSink, Weighting, WeightingActor
from pipeline.core.agents.program import GREEDY, Completion
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.record_tables import examples_from_table
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.shards import Counts, Shards
from pipeline.core.weighing import Weighted
from pipeline.recipes.grpo import GroupAdvantages

TASKS = [Question(f"q{number}", "Who?", ("Ada",)) for number in range(12)]
PER_SHARD = 3


class Same:
    """An example of every episode; the statistics are the task's id."""

    outputs = ("searcher",)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        examples = [Example.of(episode.turns[0], weight=1.0) for episode in episodes]
        return Weighted({"searcher": examples}, {"id": task.id})

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {"ids": [row["id"] for row in statistics]}


def episode_of(task: Question, sample: int = 0) -> Episode:
    transcript = Transcript()
    transcript.append_model(Completion([5, 6], [-1.0, -1.0], "", None, "eos"))
    turn = transcript.trajectory(
        question_id=task.id, sample=sample, role="searcher", policy_version=0, stop_reason=StopReason.ANSWERED
    )
    return Episode(task.id, sample, (turn,))


class Worker:
    """Gives every task one episode, which `put` makes a reference of."""

    def __init__(self, put: Callable[[Any], Any]) -> None:
        self.served: list[str] = []
        self.put = put
        self.rollout = SimpleNamespace(remote=self._rollout)
        self.wants_more = SimpleNamespace(remote=lambda: asyncio.sleep(0))

    def _rollout(self, request: RolloutRequest) -> tuple[Any, Any]:
        task: Any = request.task
        self.served.append(task.id)
        return self._receipt(), self.put([episode_of(task)])

    async def _receipt(self) -> Receipt:
        await asyncio.sleep(0.001)
        return Receipt(Counts(1, 2), 100)


class Pool:
    """An engine pool of one worker that never fails."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.rollout, self.agents_per_worker = RolloutConfig(), 4
        self.options = EngineOptions("model")

    @property
    def hands(self) -> Hands:
        return self._hands

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        asking = set[asyncio.Task[None]]()

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            asking.add(asyncio.create_task(work))

        self._hands = Hands(4, lambda worker: True, lambda worker: None, self._lose, spawn)
        self._hands.hire(self.worker)
        try:
            yield
        finally:
            for task in asking:
                task.cancel()

    def _lose(self, worker: Worker, cause: str) -> None:
        raise AssertionError(cause)


def shards_at(at: Path) -> Shards:
    shards = Shards(TASKS, at / "rollouts", {"searcher": at / "examples"}, PER_SHARD)
    shards.resume()
    return shards


async def sample_in_loop(
    at: Path,
    sink: ShardSink,
    worker: Worker,
    disturb: Callable[[int], object],
    max_restarts: int = 2,
) -> tuple[Work, Mapping[str, Any]]:
    """The whole phase; `disturb` is told how many tasks are done."""
    shards, pool = shards_at(at), Pool(worker)
    done = len(TASKS) - len(shards.to_do())
    work = Work(shards.to_do(), done=done, counts=shards.counts())
    async with sink.at_work(shards, Same(), work, max_restarts=max_restarts):
        await run_phase(Phase(None, 1, GREEDY, 0.0), work, {"searcher": pool}, sink, disturb)  # type: ignore[arg-type,dict-item]
        return work, await sink.finish()


def sample(
    at: Path,
    sink: ShardSink,
    worker: Worker,
    disturb: Callable[[int], object] = lambda done: None,
    max_restarts: int = 2,
) -> tuple[Work, Mapping[str, Any]]:
    return asyncio.run(sample_in_loop(at, sink, worker, disturb, max_restarts))


def contents(at: Path) -> dict[str, bytes]:
    return {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()}


def assert_is_whole(work: Work, statistics: Mapping[str, Any], at: Path) -> None:
    assert statistics == {"ids": [task.id for task in TASKS]}
    assert (work.done, work.counts) == (len(TASKS), Counts(len(TASKS), 2 * len(TASKS)))
    rows = [
        row for p in sorted((at / "rollouts").glob("_*.json")) for row in json.loads(p.read_text())["tasks"]
    ]
    assert [row["id"] for row in rows] == [task.id for task in TASKS]


# ---------------------------------------------------------------- stand-ins for the actor


class Mortal:
    """A weighting actor's handle that dies at a call: before it does what it was asked, or right behind."""

    def __init__(self, *, dies_at: int | None = None, after: bool = False, begins: bool = True) -> None:
        self.actor, self.calls = Weighting(), 0
        self.dies_at, self.after, self.begins, self.is_dead = dies_at, after, begins, False
        for name in ("ping", "begin", "add", "write_waiting", "finish"):
            setattr(self, name, SimpleNamespace(remote=lambda *a, name=name: self._call(name, *a)))

    async def _call(self, name: str, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        if self.is_dead or (name == "begin" and not self.begins):
            raise RayActorError()
        self.calls += name in ("add", "finish")
        dies = self.calls == self.dies_at
        if dies and not self.after:
            self.is_dead = True
            raise RayActorError()
        result = await getattr(self.actor, name)(*arguments)
        if dies:
            self.is_dead = True
            raise RayActorError()
        await asyncio.sleep(0)  # the answer travels, and may arrive behind the news of a death
        return result


@pytest.fixture
def sink_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ShardSink]:
    def made(*actors: Mortal) -> ShardSink:
        spare = iter(actors)
        monkeypatch.setattr(module, "_new_actor", lambda observer, number: next(spare))
        monkeypatch.setattr(ray, "kill", lambda actor: setattr(actor, "is_dead", True))
        return ShardSink(ClusterConfig(start_timeout_s=30))

    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    shards = shards_at(at := tmp_path_factory.mktemp("undisturbed"))
    for number in range(len(shards)):
        made = [(task, [episode_of(task)]) for task in TASKS[number * PER_SHARD : (number + 1) * PER_SHARD]]
        shards.write(number, [(episodes, Same()(task, episodes)) for task, episodes in made])
    return contents(at)


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "behind the call"])
@pytest.mark.parametrize("call", range(1, len(TASKS) + 2))
def test_an_actor_that_dies_at_any_call_costs_incomplete_shards_only(
    tmp_path: Path,
    sink_of: Callable[..., ShardSink],
    undisturbed: dict[str, bytes],
    call: int,
    after: bool,
) -> None:
    """The last call is the one that sums up."""
    worker = Worker(lambda value: value)
    work, statistics = sample(tmp_path, sink_of(Mortal(dies_at=call, after=after), Mortal()), worker)
    assert_is_whole(work, statistics, tmp_path)
    assert contents(tmp_path) == undisturbed
    # At most what the shards in hand lack is sampled twice; what a slot still has is not.
    assert len(worker.served) - len(TASKS) < 2 * PER_SHARD


def test_an_actor_that_dies_too_often_ends_the_phase(
    tmp_path: Path, sink_of: Callable[..., ShardSink]
) -> None:
    sink = sink_of(*(Mortal(dies_at=4) for _ in range(3)))
    expected = r"the weighting actor was lost 3 times in one phase \(rollout\.max_restarts: 2\)"
    with pytest.raises(ClusterError, match=expected):
        sample(tmp_path, sink, Worker(lambda value: value))
    # What was finished is kept, and the same command goes on.
    kept = shards_at(tmp_path)
    left = len(kept.to_do())
    worker = Worker(lambda value: value)
    work, statistics = sample(tmp_path, sink_of(Mortal()), worker)
    assert kept.complete and len(worker.served) == left
    assert_is_whole(work, statistics, tmp_path)


def test_an_actor_that_died_between_two_phases_or_while_it_starts_is_replaced(
    tmp_path: Path, sink_of: Callable[..., ShardSink]
) -> None:
    sink = sink_of(Mortal(begins=False), Mortal(begins=False), Mortal())
    work, statistics = sample(tmp_path, sink, Worker(lambda value: value))
    assert_is_whole(work, statistics, tmp_path)


def test_only_an_actor_that_was_started_is_waited_for_in_the_logs(
    tmp_path: Path, sink_of: Callable[..., ShardSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    up: list[tuple[str, int]] = []
    monkeypatch.setattr(Observer, "is_up", lambda self, kind, *, number: up.append((kind, number)))
    sink = sink_of(Mortal(), Mortal())
    for phase in ("first", "second"):
        sample(tmp_path / phase, sink, Worker(lambda value: value))
    assert up == [("weighting", 0)]
    sink._actor.is_dead = True
    sample(tmp_path / "third", sink, Worker(lambda value: value))
    assert up == [("weighting", 0)] * 2


@pytest.mark.parametrize("how", ["interrupt", "error"])
def test_what_is_done_when_a_phase_is_given_up_is_not_sampled_again(
    tmp_path: Path, sink_of: Callable[..., ShardSink], undisturbed: dict[str, bytes], how: str
) -> None:
    def give_up(done: int) -> None:
        if done == 8 and how == "error":
            raise ClusterError("no more")
        if done == 8:
            phase.cancel()

    async def interrupted() -> None:
        nonlocal phase
        phase = asyncio.create_task(
            sample_in_loop(tmp_path, sink_of(Mortal()), Worker(lambda value: value), give_up)
        )
        await phase

    phase: asyncio.Task[Any]
    with pytest.raises((ClusterError, asyncio.CancelledError)):
        asyncio.run(interrupted())
    worker = Worker(lambda value: value)
    work, statistics = sample(tmp_path, sink_of(Mortal()), worker)
    assert len(worker.served) <= len(TASKS) - 8
    assert_is_whole(work, statistics, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_few_tasks_are_on_their_way_to_a_slow_actor_however_many_are_sampled(
    tmp_path: Path, sink_of: Callable[..., ShardSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their episodes are copied to its node; those of the others stay where they are."""
    under_way: list[int] = []

    class Slow(Mortal):
        async def _call(self, name: str, *arguments: Any) -> Any:
            if name != "add":
                return await super()._call(name, *arguments)
            under_way.append(1 + (under_way[-1] if under_way else 0))
            await asyncio.sleep(0.005)
            under_way.append(under_way[-1] - 1)
            return await super()._call(name, *arguments)

    monkeypatch.setattr(module, "ADDS_AT_ONCE", 2)
    work, statistics = sample(tmp_path, sink_of(Slow()), Worker(lambda value: value))
    assert_is_whole(work, statistics, tmp_path)
    assert max(under_way) == 2


def test_deaths_are_counted_by_phase(tmp_path: Path, sink_of: Callable[..., ShardSink]) -> None:
    sink = sink_of(Mortal(dies_at=4), Mortal(dies_at=len(TASKS) + 5), Mortal())
    for phase in ("first", "second"):
        work, statistics = sample(tmp_path / phase, sink, Worker(lambda value: value), max_restarts=1)
        assert_is_whole(work, statistics, tmp_path / phase)


# ---------------------------------------------------------------- a real one


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.component
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(signal.SIGKILL, 8, id="dies", marks=pytest.mark.chaos),
        pytest.param(signal.SIGSTOP, 8, id="hangs"),
        pytest.param(signal.SIGSTOP, 0, id="hangs between two phases", marks=pytest.mark.chaos),
    ],
)
def test_a_real_actor_that_dies_or_hangs_is_replaced(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals, moment: int
) -> None:
    struck: list[psutil.Process] = []

    def strike(done: int) -> None:
        if done == moment and not struck:
            (actor,) = (p for p in psutil.Process().children(recursive=True) if "Weighting" in p.name())
            actor.send_signal(number)
            struck.append(actor)

    sink = ShardSink(ClusterConfig(start_timeout_s=120, heartbeat_timeout_s=3))
    try:
        undisturbed = sample(tmp_path / "undisturbed", sink, Worker(ray.put))
        strike(0)
        worker = Worker(ray.put)
        work, statistics = sample(tmp_path / "struck", sink, worker, strike)
    finally:
        sink.close()
    assert statistics == undisturbed[1]
    assert_is_whole(work, statistics, tmp_path / "struck")
    assert contents(tmp_path / "struck") == contents(tmp_path / "undisturbed")
    assert "the weighting actor is lost and replaced" in caplog.text
    _, alive = psutil.wait_procs(struck, timeout=30)
    assert not alive
    assert len(worker.served) < len(TASKS) + 2 * PER_SHARD


@pytest.mark.component
def test_a_real_actor_finds_a_reward_of_the_users_own(local_ray: None, tmp_path: Path) -> None:
    weigh = GroupAdvantages("tests.own_rewards:more_for_later_samples", "none", "exsearch")
    actor = WeightingActor.options(num_cpus=0).remote()
    try:
        ray.get(actor.begin.remote(shards_at(tmp_path), weigh), timeout=120)
        for task in TASKS:
            ray.get(actor.add.remote([episode_of(task, sample) for sample in range(2)]), timeout=60)
        statistics = ray.get(actor.finish.remote(), timeout=60)
    finally:
        ray.kill(actor)
    assert statistics["reward"] == 1.5
    examples = examples_from_table(pq.read_table(tmp_path / "examples"))
    assert [example.number("advantage") for example in examples] == [-0.5, 0.5] * len(TASKS)
