"""What a phase of sampling does when something behind it fails. Workers and sinks are stand-ins; no Ray cluster."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors import shift as module
from actors.engine_options import EngineOptions
from actors.memory import Memory
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from actors.rollout import Peer, PeerDied, Receipt, RolloutRequest
from actors.sampling import Phase, Work, run_phase
from actors.seats import Seat
from actors.session import ClusterError
from pipeline.core.agents.program import GREEDY, Task
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import Snapshot
from pipeline.core.records import Question
from pipeline.core.shards import Counts


class Worker:
    """Answers every request with one episode; dead from the request with the number `dies_at` on."""

    def __init__(self, *, failures: int = 0, dies_at: float = math.inf, starts: bool = True) -> None:
        self.requests = 0
        self.failures = failures
        self.dies_at = dies_at
        self.starts = starts
        self.started_with: int | None = None
        self.rollout = SimpleNamespace(remote=self._rollout)
        self.wants_more = SimpleNamespace(remote=lambda: asyncio.sleep(0))
        self.where = SimpleNamespace(remote=self._where)
        self.start = SimpleNamespace(remote=self._start)

    def _rollout(self, request: RolloutRequest) -> tuple[Any, Any]:
        self.requests += 1
        return self._answer(request, self.requests >= self.dies_at), request.task.id

    async def _answer(self, request: RolloutRequest, dies: bool) -> Receipt:
        await asyncio.sleep(0)
        if dies:
            raise RayActorError()
        for role, peer in request.peers.items():
            if peer.handle.dies_at <= 0:
                raise RayTaskError("rollout", "traceback", PeerDied(role))
        return Receipt(Counts(1, 10, self.failures, "down" if self.failures else ""), 400)

    async def _where(self) -> str:
        return "node"

    async def _start(self, model: str, version: int) -> None:
        self.started_with = version
        if not self.starts:
            raise RayActorError()


PLACEMENT = PolicyPlacement("shared_memory", [0, 1], [], 0.0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Workers that were ended."""
    workers: list[Worker] = []
    monkeypatch.setattr(ray, "kill", workers.append)
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "alive_nodes", lambda: {"node"})
    return workers


def pool(*workers: Worker, size: int = 1, **settings: Any) -> EnginePool:
    """The first `size` are at work; the others are their replacements, in this order."""
    rollout = RolloutConfig(workers=size, concurrency=1, **settings)
    made = EnginePool("a", EngineOptions("model"), rollout, ClusterConfig(), PLACEMENT, dict, None)  # type: ignore[arg-type]
    made._seats = [Seat(index, worker, "node") for index, worker in enumerate(workers[:size])]
    spare = iter(workers[size:])
    made._new_worker = lambda index: next(spare)  # type: ignore[method-assign]
    return made


class Sink:
    """Takes episodes; `raises` is what it does the first time instead."""

    def __init__(self, raises: Exception | None = None) -> None:
        self.taken: list[str] = []
        self.raises = raises

    async def __call__(self, task: Task, counts: Counts, reference: Any) -> None:
        error, self.raises = self.raises, None
        if error is not None:
            raise error
        self.taken.append(reference)


def questions(number: int) -> list[Question]:
    return [Question(f"q{i}", "Who?", ("Ada",)) for i in range(number)]


def run(
    pools: EnginePool | dict[str, EnginePool],
    number: int,
    sink: Any = None,
    *,
    work: Work | None = None,
    progress: list[int] | None = None,
) -> int:
    """How many tasks were done."""
    work = work or Work(questions(number))
    roles = pools if isinstance(pools, dict) else {"searcher": pools}
    phase = Phase(None, 1, GREEDY, max_failure_share=0.02)  # type: ignore[arg-type]
    told = progress if progress is not None else []
    asyncio.run(run_phase(phase, work, roles, sink or Sink(), told.append))
    return work.done


def test_a_phase_of_few_episodes_that_all_fail_is_no_result() -> None:
    with pytest.raises(ClusterError, match=r"3 of 3 trajectories failed .* last: down"):
        run(pool(Worker(failures=1)), 3)


def test_a_phase_in_which_many_episodes_fail_ends_before_all_are_sampled() -> None:
    failing = Worker(failures=1)
    with pytest.raises(
        ClusterError, match=r"50 of 50 trajectories failed .* rollout.max_failure_share \(2%\)"
    ):
        run(pool(failing), 500)
    assert failing.requests < 100


def test_tasks_of_a_dead_worker_go_to_its_replacement_and_none_is_done_twice() -> None:
    first, second, sink = Worker(dies_at=2), Worker(), Sink()
    assert run(pool(first, second), 5, sink) == 5
    assert second.requests >= 3
    assert sorted(sink.taken) == [f"q{i}" for i in range(5)]


def test_a_replacement_serves_the_version_of_the_others() -> None:
    second = Worker()
    dying = pool(Worker(dies_at=1), second)
    dying.now_serves(Snapshot(5, "model-5"))
    run(dying, 1)
    assert second.started_with == 5
    assert dying.peer(second) == Peer(second, EngineOptions("model-5"), 5)


def test_a_replacement_that_dies_while_it_starts_is_replaced_too() -> None:
    last = Worker()
    assert run(pool(Worker(dies_at=1), Worker(starts=False), last), 2) == 2
    assert last.requests == 2


def test_restarts_are_bounded() -> None:
    dying = [Worker(starts=False) for _ in range(3)]
    with pytest.raises(ClusterError, match=r"failed 3 times in one phase \(rollout\.max_restarts: 2\)"):
        run(pool(Worker(dies_at=1), *dying), 2)


@pytest.mark.parametrize("where", ["from the sink", "from its task"])
def test_episodes_that_were_lost_with_their_node_are_sampled_again(where: str) -> None:
    lost = ObjectLostError("00" * 28, None, "stack")
    sink = Sink(lost if where == "from the sink" else RayTaskError("add", "traceback", lost))
    first, second = Worker(), Worker()
    assert run(pool(first, second), 1, sink) == 1
    assert (second.requests, sink.taken) == (1, ["q0"])


def test_a_bug_in_the_sink_is_not_hidden() -> None:
    with pytest.raises(RayTaskError):
        run(pool(Worker()), 1, Sink(RayTaskError("add", "traceback", ZeroDivisionError())))


def test_the_dead_worker_of_another_role_is_replaced_and_the_task_done_again() -> None:
    home, sink = Worker(), Sink()
    other = pool(Worker(dies_at=0), Worker())
    assert run({"selector": pool(home), "generator": other}, 3, sink) == 3
    assert sorted(sink.taken) == ["q0", "q1", "q2"]
    assert other.receivers()[0].handle.dies_at == math.inf


def test_roles_of_one_policy_are_played_by_the_worker_itself() -> None:
    seen: list[RolloutRequest] = []

    class Looking(Worker):
        def _rollout(self, request: RolloutRequest) -> tuple[Any, Any]:
            seen.append(request)
            return super()._rollout(request)

    one, other = pool(Looking()), pool(Worker())
    run({"rewriter": one, "answerer": one, "judge": other}, 1)
    assert seen[0].roles == ("rewriter", "answerer")
    assert list(seen[0].peers) == ["judge"]


def test_a_resumed_phase_counts_what_was_done_before() -> None:
    """As if it had never stopped: 2 of 100 trajectories may fail, 2 of 99 may not."""
    progress: list[int] = []
    before = Counts(episodes=98, generated_tokens=980)
    work = Work(questions(2), done=98, counts=before)
    assert run(pool(Worker(failures=1)), 2, work=work, progress=progress) == 100
    assert work.counts == Counts(100, 1000, 2, "down")
    assert progress == [99, 100]
    with pytest.raises(ClusterError, match="2 of 99 trajectories failed"):
        run(pool(Worker(failures=1)), 3, work=Work(questions(3), done=97, counts=Counts(episodes=97)))


def test_tasks_that_the_sink_loses_are_sampled_again_and_counted_once() -> None:
    """The last task of all finds out that those before it are lost, when every slot has run out of work."""
    work, worker = Work(questions(5)), Worker()

    class Forgetful(Sink):
        async def __call__(self, task: Task, counts: Counts, reference: Any) -> None:
            await super().__call__(task, counts, reference)
            if len(self.taken) == 5:
                work.again([(question, counts) for question in questions(5)[:4]])

    sink = Forgetful()
    assert run(pool(worker), 5, sink, work=work) == 5
    assert sorted(sink.taken[5:]) == ["q0", "q1", "q2", "q3"]
    assert work.counts == Counts(5, 50)


def test_counts_of_a_phase_take_no_longer_the_longer_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sum per task, and nothing is kept of a task that is done."""
    sums: list[Counts] = []
    add = Counts.__add__
    monkeypatch.setattr(Counts, "__add__", lambda self, other: sums.append(other) or add(self, other))
    assert run(pool(Worker()), 300) == 300
    assert len(sums) == 300


def test_a_worker_that_joins_takes_tasks_at_once_and_one_that_is_to_leave_takes_no_more(
    monkeypatch: pytest.MonkeyPatch, killed: list[Worker]
) -> None:
    first, second, homeless = Worker(), Worker(), Worker()
    draining: set[str] = set()
    monkeypatch.setattr(module, "draining_nodes", lambda: draining)
    monkeypatch.setattr(module, "NODES_EVERY_S", 0.001)
    growing = pool(first, second, homeless, max_workers=2)
    growing._seats.append(Seat(1))
    second.where = in_room_after(0.05, "another node")
    homeless.where = in_room_after(3600, "no node")

    class Slow(Sink):
        """So that there is time to join."""

        async def __call__(self, task: Task, counts: Counts, reference: Any) -> None:
            await asyncio.sleep(0.01)
            await super().__call__(task, counts, reference)
            if second.requests >= 5:
                draining.add("node")

    sink = Slow()
    assert run(growing, 400, sink) == 400
    assert sorted(sink.taken) == sorted(f"q{i}" for i in range(400))
    assert first in killed and second not in killed
    assert second.requests > first.requests


@pytest.mark.parametrize(("number", "at_once"), [(20, 100), (300, 256), (7, 1)])
def test_tasks_are_spread_evenly_though_one_worker_could_hold_them_all(number: int, at_once: int) -> None:
    workers = [Worker() for _ in range(3)]
    spread = pool(*workers, size=3)
    spread.agents_per_worker = at_once
    run(spread, number)
    requests = [worker.requests for worker in workers]
    assert max(requests) - min(requests) <= 1
    assert sum(requests) == number


def test_a_worker_that_is_faster_gets_more() -> None:
    class Slow(Worker):
        async def _answer(self, request: RolloutRequest, dies: bool) -> Receipt:
            await asyncio.sleep(0.02)
            return await super()._answer(request, dies)

    slow, fast = Slow(), Worker()
    run(pool(slow, fast, size=2), 60)
    assert fast.requests > 5 * slow.requests


async def together(pool: EnginePool, *sizes: int) -> list[Sink]:
    """Phases of so many questions at once; their sinks."""
    sinks = [Sink() for _ in sizes]
    phase = Phase(None, 1, GREEDY, max_failure_share=0.02)  # type: ignore[arg-type]
    phases = [
        run_phase(phase, Work(questions(number)), {"searcher": pool}, sink, lambda done: None)
        for number, sink in zip(sizes, sinks, strict=True)
    ]
    await asyncio.gather(*phases)
    return sinks


def test_phases_that_overlap_share_the_workers_and_their_replacements() -> None:
    """The shorter one ends long before the other, which goes on with the same workers."""
    workers = [Worker(dies_at=15), Worker(), Worker()]
    short, long = asyncio.run(together(pool(*workers, size=2), 5, 90))
    assert sorted(short.taken) == sorted(f"q{i}" for i in range(5))
    assert sorted(long.taken) == sorted(f"q{i}" for i in range(90))
    assert all(worker.requests > 10 for worker in workers)


def test_one_worker_is_given_no_more_by_several_phases_than_it_has_room_for() -> None:
    class Watched(Worker):
        in_hand = most = 0

        async def _answer(self, request: RolloutRequest, dies: bool) -> Receipt:
            self.in_hand += 1
            self.most = max(self.most, self.in_hand)
            await asyncio.sleep(0.001)
            self.in_hand -= 1
            return await super()._answer(request, dies)

    worker = Watched()
    shared = pool(worker)
    shared.agents_per_worker = 4
    asyncio.run(together(shared, 30, 30))
    # It says at once that none of what it has waits, so it is given up to four times its slots.
    assert shared.agents_per_worker < worker.most <= 4 * shared.agents_per_worker


def test_all_phases_hear_that_too_many_workers_are_lost() -> None:
    async def both() -> Sequence[object]:
        lost = pool(Worker(dies_at=3), *(Worker(starts=False) for _ in range(3)))
        return await asyncio.gather(together(lost, 9), together(lost, 9), return_exceptions=True)

    assert [type(outcome) for outcome in asyncio.run(both())] == [ClusterError, ClusterError]


def in_room_after(seconds: float, node: str) -> Any:
    """The `where` of such a worker."""

    async def where() -> str:
        await asyncio.sleep(seconds)
        return node

    return SimpleNamespace(remote=where)


@pytest.mark.parametrize(("memory", "fit"), [(1200, 3), (100, 1), (math.inf, 20)])
def test_a_slow_sink_slows_the_workers_down_before_what_waits_fills_the_memory(
    memory: float, fit: int
) -> None:
    """A task takes 400 bytes. Without a limit a worker has four times as many in hand as its engine has slots."""
    waiting: set[str] = set()
    most = 0

    class Slow(Sink):
        async def __call__(self, task: Task, counts: Counts, reference: Any) -> None:
            nonlocal most
            waiting.add(task.id)
            most = max(most, len(waiting))
            await asyncio.sleep(0.005)
            await super().__call__(task, counts, reference)
            waiting.remove(task.id)

    workers = [Worker() for _ in range(5)]
    large, work = pool(*workers, size=5), Work(questions(40))
    phase = Phase(None, 1, GREEDY, max_failure_share=0.0)  # type: ignore[arg-type]
    asyncio.run(run_phase(phase, work, {"searcher": large}, Slow(), lambda done: None, Memory(memory, 25)))
    assert (work.done, most) == (40, fit)
