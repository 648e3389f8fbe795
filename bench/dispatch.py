"""How a phase spreads its questions over engines, on a clock that jumps from event to event.

    python -m bench.dispatch [--workers 16] [--concurrency 32] [--questions 2000]

Real is what decides: `actors.sampling`, `actors.hands` and the order of `pipeline.core.order`. Stand-ins are the
engines (`bench.stand_in`), whose trajectories' lengths have a long tail; all else takes no time. The questions go in
their order, or those at the end in the order of their lengths in another iteration. Compared are engines each of whose
slots takes the next trajectory as soon as it is free, and Search-R1's turn loop (`bench.scale.lock_step_s`).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from actors.hands import Hands
from actors.rollout import Receipt, RolloutRequest
from actors.sampling import Phase, Work, run_phase
from bench.measure import HEADER, Brevity, Ratio, print_table
from bench.scale import SAMPLES, SEED, ideal_s, lock_step_s, questions
from bench.stand_in import Pace, Worker, in_no_time
from pipeline.core.agents.program import Sampling, Task
from pipeline.core.order import TIMES_IN_FLIGHT, longest_first
from pipeline.core.shards import Counts


class Near:
    """A worker in this process, as a phase calls it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.rollout = SimpleNamespace(remote=self._rollout)
        self.wants_more = SimpleNamespace(remote=worker.slots.nobody_waits)

    def _rollout(self, request: RolloutRequest) -> tuple[Any, None]:
        return asyncio.ensure_future(self._receipt(request)), None

    async def _receipt(self, request: RolloutRequest) -> Receipt:
        samples = range(request.samples)
        turns = await self._worker.sample(request.task, request.sampling.seed, samples)
        return Receipt(Counts(len(turns), sum(map(sum, turns))), 0)


class Crew:
    """As a phase sees a pool none of whose workers ever fails."""

    def __init__(self, pace: Pace, workers: int, concurrency: int) -> None:
        self.agents_per_worker = concurrency
        self._workers = [Near(Worker(pace, concurrency)) for _ in range(workers)]

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        asking = set[asyncio.Task[None]]()

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            asking.add(asyncio.create_task(work))

        self.hands = Hands(self.agents_per_worker, lambda worker: True, _nothing, _nothing, spawn)
        for worker in self._workers:
            self.hands.hire(worker)
        yield
        for task in asking:
            task.cancel()


def _nothing(*_: object) -> None:
    pass


def dispatched_s(
    pace: Pace, workers: int, concurrency: int, tasks: Sequence[Task], samples: int = SAMPLES
) -> float:
    """Of these questions, in this order."""

    async def weigh(task: Task, counts: Counts, episodes: Any) -> None:
        pass

    async def phase() -> None:
        crew: Any = Crew(pace, workers, concurrency)
        what: Phase = Phase(None, samples, Sampling(1.0, seed=SEED), 0.0)  # type: ignore[arg-type]
        await run_phase(what, Work(tasks), {"searcher": crew}, weigh, lambda done: None)

    return in_no_time(phase)


def lengths(pace: Pace, tasks: Sequence[Task]) -> dict[str, float]:
    """Tokens of each question's trajectories in another iteration."""
    worker = Worker(pace, 1)
    return {
        task.id: sum(sum(worker.turns(task, SEED - 1, sample)) for sample in range(SAMPLES)) for task in tasks
    }


def run(workers: int = 16, concurrency: int = 32, number: int = 2000) -> list[Ratio]:
    """For the table of `python -m bench`."""
    if Brevity.is_on:
        number //= 20
    pace, tasks = Pace(), questions(number)
    ordered = longest_first(tasks, lengths(pace, tasks), TIMES_IN_FLIGHT * workers * concurrency // SAMPLES)
    limits = {
        "slots that are never empty": (ideal_s(pace, workers, concurrency, number), 0.95),
        "lock-step turns, retriever of 300 ms": (lock_step_s(pace, workers, concurrency, number), 2.0),
    }
    seconds = {
        "questions in order": dispatched_s(pace, workers, concurrency, tasks),
        "the longest of the last first": dispatched_s(pace, workers, concurrency, ordered),
    }

    def rate(seconds: float) -> list[float]:
        return [number * SAMPLES / seconds]

    what = f"dispatch to {workers} stand-in engines, {workers * concurrency} trajectories at once"
    return [
        Ratio(f"{what}, {way}", limit, "trajectories", rate(took), rate(at_best), goal)
        for way, took in seconds.items()
        for limit, (at_best, goal) in limits.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=32, help="trajectories at once, per worker")
    parser.add_argument("--questions", type=int, default=2000, help=f"{SAMPLES} trajectories each")
    arguments = parser.parse_args()
    ratios = run(arguments.workers, arguments.concurrency, arguments.questions)
    print_table(HEADER, [ratio.cells() for ratio in ratios])


if __name__ == "__main__":
    main()
