"""The driver of a large E-step: what it costs of the engines' time, and how that grows.

    python -m bench.scale [--workers 64] [--concurrency 160] [--questions 16000] [--overhead 1000 10000 100000]

Real are the pool, the phase, the sink, the weighting actor with ExSearch's weights, the shards on disk, the progress
display and all of Ray between them. Stand-ins are the engines (`bench.stand_in`), several of them in one process, and
the retriever: a search takes a fixed time. The ideal is the time of the same trajectories on the same engines with a
driver that takes none and leaves no slot empty: there the clock jumps from event to event. With `--overhead` a phase of
each size is run on engines that answer at once, and what it costs the driver is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from rich.console import Console

from actors.engine_options import EngineOptions
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from actors.sampling import Phase, Work, run_phase
from actors.session import ray_session
from actors.weighting import ShardSink
from bench.measure import Brevity, Ratio, print_table
from bench.stand_in import Handle, Host, Pace, Worker, in_no_time
from pipeline.core.agents.program import Sampling
from pipeline.core.config import AgentConfig, ClusterConfig, RolloutConfig, WeightingConfig
from pipeline.core.display import Display
from pipeline.core.policies import Snapshot
from pipeline.core.records import Question
from pipeline.core.shards import Shards
from pipeline.core.weighing import SearchWeights

TOKENIZER = str(Path(__file__).parents[1] / "models" / "tiny-searcher")
WORKERS, CONCURRENCY, QUESTIONS, SAMPLES = 64, 160, 16_000, 4
HOSTS = 4
SEED = 7
LOCAL = ClusterConfig(address="local")
"""A Ray of its own, also where another one runs on this machine."""
SMALL = Pace(1e-9, 0.0, 0.0, turns=1, turn_tokens=50)
"""Engines that answer at once, with little."""


@dataclass
class Cost:
    """Of one phase, in the driver's process."""

    questions: int
    seconds: float = 0.0
    """From its start to its end."""
    cpu_s: float = 0.0
    resume_s: float = 0.0
    """To find out, on disk, that all of it is done."""
    memory_mib: list[float] = field(default_factory=list)
    """Once a second."""
    generated_tokens: int = 0

    @property
    def memory(self) -> tuple[float, float]:
        """In the second tenth of the time, when all is in flight, and at the end."""
        tenth = max(1, len(self.memory_mib) // 10)
        return max(self.memory_mib[tenth : 2 * tenth + 1]), max(self.memory_mib[-tenth:])


class StandIns(EnginePool):
    """A pool whose workers live in a few processes."""

    def __init__(self, pace: Pace, workers: int, concurrency: int) -> None:
        each = math.ceil(workers / HOSTS)
        hosts = [
            Host.options(num_cpus=0, max_concurrency=10_000).remote(pace, concurrency, each)  # type: ignore[attr-defined]
            for _ in range(HOSTS)
        ]
        self._handles = [Handle(hosts[number % HOSTS], number // HOSTS) for number in range(workers)]
        rollout = RolloutConfig(workers=workers, concurrency=concurrency, samples=SAMPLES)
        placement = PolicyPlacement("shared_memory", list(range(workers)), [], 0.0, 0.0, 0.0)
        retriever: Any = None
        super().__init__(
            "searcher", EngineOptions(TOKENIZER), rollout, ClusterConfig(), placement, _no_room, retriever
        )
        self.start(Snapshot(0, TOKENIZER))
        self.hosts = hosts

    def _new_worker(self, index: int) -> Any:
        return self._handles[index]

    def close(self) -> None:
        for host in self.hosts:
            ray.kill(host)


def _no_room(bundle: int | None, gpus: float) -> dict[str, Any]:
    raise AssertionError("stand-ins live with their hosts")


def questions(number: int) -> list[Question]:
    return [Question(f"q{n}", f"Who was number {n}?", ("Ada",)) for n in range(number)]


def phase_of(pool: EnginePool, number: int, at: Path) -> Cost:
    """An E-step, as `Cluster.sample` and `Run.sample` do it."""
    weigh = SearchWeights(WeightingConfig(), AgentConfig(), TOKENIZER)
    directories = {name: at / name for name in weigh.outputs}
    shards = Shards(questions(number), at / "rollouts", directories, RolloutConfig().questions_per_shard)
    shards.resume()
    work, sink, cost = Work(shards.to_do()), ShardSink(ClusterConfig()), Cost(number)
    phase: Phase = Phase(None, SAMPLES, Sampling(1.0, seed=SEED), 0.0)  # type: ignore[arg-type]
    display = Display(Console(quiet=True))

    async def whole() -> Mapping[str, Any]:
        async with sink.at_work(shards, weigh, work, max_restarts=0):
            await run_phase(phase, work, {"searcher": pool}, sink, lambda done: advance.to(done, number))
            return await sink.finish()

    with display.follow(at), display.progress("sampling", number, "questions") as advance, _measured(cost):
        asyncio.run(whole())
    sink.close()
    cost.generated_tokens = work.counts.generated_tokens
    began = time.monotonic()
    shards.resume()
    cost.resume_s = time.monotonic() - began
    assert not shards.to_do()
    return cost


@contextmanager
def _measured(cost: Cost) -> Iterator[None]:
    ended, process = threading.Event(), psutil.Process()

    def watch() -> None:
        while not ended.wait(1.0):
            cost.memory_mib.append(process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch)
    began, cpu_s = time.monotonic(), time.process_time()
    watcher.start()
    try:
        yield
    finally:
        cost.seconds, cost.cpu_s = time.monotonic() - began, time.process_time() - cpu_s
        ended.set()
        watcher.join()
        cost.memory_mib.append(process.memory_info().rss / 2**20)


def ideal_s(pace: Pace, workers: int, concurrency: int, number: int, samples: int = SAMPLES) -> float:
    """Of the same trajectories in the same order, where no driver, no network and no disk takes any time, and a slot
    that gets free takes the next one at once."""
    to_do = ((question, sample) for question in questions(number) for sample in range(samples))

    async def slot(worker: Worker) -> None:
        for question, sample in to_do:
            await worker.sample(question, SEED, range(sample, sample + 1))

    async def all_of_them() -> None:
        pool = [Worker(pace, concurrency) for _ in range(workers)]
        await asyncio.gather(*(slot(worker) for _ in range(concurrency) for worker in pool))

    return in_no_time(all_of_them)


def lock_step_s(pace: Pace, workers: int, concurrency: int, number: int) -> float:
    """Of the same questions in the turn loop of Search-R1 (`LLMGenerationManager.run_llm_loop`): a batch that fills all
    engines writes a turn, all of it is searched for at once, and so on until its last trajectory has ended; then the
    next batch. Driver, network and disk take no time here either.
    """
    pool = [Worker(pace, concurrency) for _ in range(workers)]
    drawn = [
        pool[0].turns(question, SEED, sample) for question in questions(number) for sample in range(SAMPLES)
    ]

    async def all_of_them() -> None:
        for first in range(0, len(drawn), workers * concurrency):
            batch = list(
                zip(drawn[first : first + workers * concurrency], itertools.cycle(pool), strict=False)
            )
            for turn in range(pace.turns):
                batch = [(turns, worker) for turns, worker in batch if turn < len(turns)]
                if turn and batch:
                    await asyncio.sleep(pace.search_s)
                await asyncio.gather(*(worker.turn(turns[turn]) for turns, worker in batch))

    return in_no_time(all_of_them)


def efficiency(workers: int, concurrency: int, number: int) -> tuple[Cost, float]:
    """What a phase cost, and its ideal seconds."""
    pace = Pace()
    ideal = ideal_s(pace, workers, concurrency, number)
    with ray_session(LOCAL), tempfile.TemporaryDirectory() as at:
        pool = StandIns(pace, workers, concurrency)
        try:
            return phase_of(pool, number, Path(at)), ideal
        finally:
            pool.close()


def overhead(sizes: Sequence[int]) -> list[Cost]:
    """Of phases of so many questions, the first one twice: it does not count the first time."""
    with ray_session(LOCAL):
        pool = StandIns(SMALL, WORKERS, CONCURRENCY)
        try:
            with tempfile.TemporaryDirectory() as at:
                costs = [phase_of(pool, size, Path(at) / str(n)) for n, size in enumerate([sizes[0], *sizes])]
            return costs[1:]
        finally:
            pool.close()


def run(workers: int = WORKERS, concurrency: int = CONCURRENCY, number: int = QUESTIONS) -> list[Ratio]:
    """For the table of `python -m bench`."""
    if Brevity.is_on:
        workers, concurrency, number = workers // 8, concurrency // 4, number // 64
    cost, ideal = efficiency(workers, concurrency, number)
    what = f"E-step, {workers} stand-in engines, {workers * concurrency:,} trajectories at once"
    lock_step = lock_step_s(Pace(), workers, concurrency, number)

    def ratio(limit: str, seconds: float, goal: float) -> Ratio:
        trajectories = cost.questions * SAMPLES
        return Ratio(
            what, limit, "trajectories", [trajectories / cost.seconds], [trajectories / seconds], goal
        )

    return [
        ratio("a driver that takes no time", ideal, 0.95),
        ratio(f"lock-step turns, retriever of {1000 * Pace().search_s:.0f} ms", lock_step, 2.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument(
        "--concurrency", type=int, default=CONCURRENCY, help="trajectories at once, per worker"
    )
    parser.add_argument("--questions", type=int, default=QUESTIONS, help=f"{SAMPLES} trajectories each")
    parser.add_argument(
        "--overhead", type=int, nargs="+", metavar="QUESTIONS", help="only this, at these sizes"
    )
    arguments = parser.parse_args()
    if arguments.overhead:
        header = "questions; seconds; driver CPU (s); per question (ms); resume (s); driver memory, begin, end (MiB)"
        print_table(header, map(_overhead_row, overhead(arguments.overhead)))
        return
    cost, ideal = efficiency(arguments.workers, arguments.concurrency, arguments.questions)
    begin, end = cost.memory
    header = "trajectories at once; questions; seconds; ideal; efficiency; tokens/s; driver CPU; driver memory (MiB)"
    row = [
        f"{arguments.workers} x {arguments.concurrency}",
        f"{cost.questions:,}",
        f"{cost.seconds:.1f}",
        f"{ideal:.1f}",
        f"{ideal / cost.seconds:.3f}",
        f"{cost.generated_tokens / cost.seconds:,.0f}",
        f"{cost.cpu_s / cost.seconds:.0%}",
        f"{begin:.0f}, {end:.0f}",
    ]
    print_table(header, [row])


def _overhead_row(cost: Cost) -> list[str]:
    begin, end = cost.memory
    return [
        f"{cost.questions:,}",
        f"{cost.seconds:.1f}",
        f"{cost.cpu_s:.1f}",
        f"{1000 * cost.cpu_s / cost.questions:.2f}",
        f"{cost.resume_s:.1f}",
        f"{begin:.0f}, {end:.0f}",
    ]


if __name__ == "__main__":
    main()
