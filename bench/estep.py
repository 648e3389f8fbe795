"""The E-step with a retriever in the loop, against its limit and against a loop that goes in lock-step.

    python -m bench.estep [--model DIR] [--questions 400] [--runs 5] [--json FILE]

Ours is the whole phase, as a run does it: engines, retriever actor, weighting actor, shards on disk. While it runs the
first time, each worker keeps what its engine and the retriever were asked. The limit is the time of the same requests,
seeds and all, on the same engines with nobody who searches between them, and then of the same queries in full batches;
so generation, scoring and retrieval are all in it. Lock-step is Search-R1's turn loop on the same engines and
retriever: all trajectories write a turn, then all queries are searched in one batch, and so on. What such a loop does
between the turns, parsing and rendering, the same program does; it weighs nothing and writes no shards.

The three are measured in turn; before each the engines load their weights anew, which empties their caches.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors.cluster import Cluster
from actors.retriever import ActorReplica, RetrieverActor, client_of
from actors.rollout import RolloutRequest
from actors.session import actor_environment, count_devices, ray_session
from bench.asked import Again, LockStep, Noting
from bench.measure import HEADER, RUNS, TINY, Brevity, Ratio, circumstances, print_table, write_ratios
from pipeline.commands.demo import demo_config
from pipeline.core.agents.program import Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import ClusterConfig, Config
from pipeline.core.data.splits import load_splits
from pipeline.core.data.world.writer import write_world
from pipeline.core.display import Display
from pipeline.core.policies import Snapshot
from pipeline.core.retrieval import prepare_index
from pipeline.core.shards import Shards
from pipeline.core.weighing import SearchWeights
from pipeline.em import searcher_of

QUESTIONS, FEW = 400, 20
SEED = 7
RETRIEVAL_BATCH = 128


class Bench:
    """A cluster, and the three ways through one E-step. Each gives its seconds."""

    def __init__(self, config: Config, index: Path, scratch: Path) -> None:
        self.config, self._scratch = config, scratch
        self.questions = load_splits(config.data, config.seed, required=("train",)).train
        self.spec = searcher_of(config)
        self.model = Snapshot(0, config.model.path)
        self.cluster = Cluster([self.spec], config.cluster, config.retriever, index)
        # Without a memory of queries: later rounds would find all of theirs there.
        environment = actor_environment(on_gpu=False)
        self.retriever = RetrieverActor.options(  # type: ignore[attr-defined]
            num_cpus=0, runtime_env={"env_vars": environment}
        ).remote(
            str(index),
            cached_queries=0,
            num_threads=config.retriever.threads_per_replica,
            sharers=1 + config.rollout.workers,
            wait_s=config.retriever.batch_wait_s,
        )
        ray.get(self.retriever.ready.remote())
        self.pool = self.cluster.policy(SEARCHER).pool
        assert self.pool is not None
        self.pool.search_with(client_of([ActorReplica(self.retriever)], config.retriever))
        self.concurrency = self.pool.agents_per_worker
        self.queries: list[str] = []
        self.tokens = self.trajectories = 0
        self._rounds = itertools.count()

    def ours(self, *, noting: bool = False) -> float:
        """The whole phase; nothing of it stays."""
        at = self.fresh()
        seconds = self.e_step(at, noting=noting)
        shutil.rmtree(at)
        return seconds

    def fresh(self) -> Path:
        """A place for what a round writes."""
        return self._scratch / str(next(self._rounds))

    def e_step(self, at: Path, *, noting: bool = False) -> float:
        """The whole phase; its shards are in `at / "rollouts"` and `at / "examples"`."""
        self._begin()
        config = self.config
        shards = Shards(self.questions, at / "rollouts", {SEARCHER: at / "examples"}, 100)
        shards.resume()
        program: Any = SearchProgram(config.agent, score_answers=True)
        began = time.perf_counter()
        phase = self.cluster.begin(
            Noting(program) if noting else program,
            shards,
            SearchWeights(config.weighting, config.agent, config.model.path),
            {SEARCHER: self.cluster.policy(SEARCHER)},
            samples=config.rollout.samples,
            sampling=Sampling.of(config.rollout, SEED),
        )
        report = phase.result()
        seconds = time.perf_counter() - began
        if noting:
            self.queries = [step.query for episode in shards.episodes() for step in episode.turns[0].steps]
            self.tokens, self.trajectories = report.generated_tokens, report.trajectories
        assert report.generated_tokens == self.tokens
        return seconds

    def limit(self) -> float:
        """The same requests with nobody between them, then the same queries."""
        self._begin()
        began = time.perf_counter()
        self._again(Again(self.concurrency))
        for first in range(0, len(self.queries), RETRIEVAL_BATCH):
            batch = self.queries[first : first + RETRIEVAL_BATCH]
            ray.get(self.retriever.search.remote(batch, self.config.agent.documents))
        return time.perf_counter() - began

    def lock_step(self) -> float:
        """All trajectories turn by turn."""
        self._begin()
        began = time.perf_counter()
        self._again(LockStep(SearchProgram(self.config.agent, score_answers=True)))
        return time.perf_counter() - began

    def close(self) -> None:
        ray.kill(self.retriever)
        self.cluster.close()

    def _begin(self) -> None:
        assert self.pool is not None
        self.pool.reload(self.model)

    def _again(self, program: Again | LockStep) -> None:
        assert self.pool is not None
        request = RolloutRequest(self.questions[0], program, 1, Sampling(1.0), (SEARCHER,))
        ray.get([receiver.handle.rollout.remote(request)[0] for receiver in self.pool.receivers()])


@dataclass(frozen=True)
class Measured:
    """Seconds of each way, one per round, and what was done in a round."""

    ours: list[float]
    limit: list[float]
    lock_step: list[float]
    trajectories: int
    tokens: int
    searches: int

    def ratios(self, name: str) -> list[Ratio]:
        def rates(seconds: list[float]) -> list[float]:
            return [self.tokens / s for s in seconds]

        what = f"E-step, {name}"
        return [
            Ratio(what, "engines alone, then retrieval", "tokens", rates(self.ours), rates(self.limit), 0.85),
            Ratio(what, "lock-step turns", "tokens", rates(self.ours), rates(self.lock_step), 1.25),
        ]


@contextmanager
def opened(model: Path, questions: int, overrides: Sequence[str] = ()) -> Iterator[Bench]:
    """A bench on the demo's world, up and working."""
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        write_world(world, seed=0, size="small")
        display = Display(Console(quiet=True))
        with ray_session(ClusterConfig(address="local")):
            settings = [f"model.path={model}", f"data.train_limit={questions}", *overrides]
            config = demo_config(world, settings, count_devices())
            index = prepare_index(config.retriever, config.data, Path(scratch) / "index", display)
            assert isinstance(index, Path)
            bench = Bench(config, index, Path(scratch))
            try:
                yield bench
            finally:
                bench.close()


def measure(model: Path, questions: int, runs: int, overrides: Sequence[str] = ()) -> Measured:
    with opened(model, questions, overrides) as bench:
        bench.ours(noting=True)
        bench.limit(), bench.lock_step()
        rounds = [(bench.ours(), bench.limit(), bench.lock_step()) for _ in range(runs)]
    ours, limit, lock_step = (list(column) for column in zip(*rounds, strict=True))
    return Measured(ours, limit, lock_step, bench.trajectories, bench.tokens, len(bench.queries))


def run() -> list[Ratio]:
    """For the table of `python -m bench`."""
    questions = FEW if Brevity.is_on else QUESTIONS
    return measure(TINY, questions, Brevity.runs()).ratios("tiny model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="as of `python -m bench`")
    parser.add_argument("overrides", nargs="*", help="configuration of the demo, key=value")
    arguments, when = parser.parse_args(), circumstances()
    measured = measure(arguments.model, arguments.questions, arguments.runs, arguments.overrides)
    ratios = measured.ratios(arguments.model.name)
    print_table(HEADER, [ratio.cells() for ratio in ratios])
    if arguments.json is not None:
        write_ratios(arguments.json, ratios, when)
    seconds = statistics.median(measured.ours)
    print(
        f"{measured.trajectories} trajectories, {measured.searches} searches, {measured.tokens} generated tokens in "
        f"{seconds:.1f} s: {measured.trajectories / seconds:.1f} trajectories/s with retrieval in the loop"
    )


if __name__ == "__main__":
    main()
